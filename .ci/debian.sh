#!/bin/sh
# Installs the Debian packages that a verb needs: .ci/debian.sh VERB. Where it cannot, it stops with the command to run.
# A program counts as present wherever it came from; only what is missing is installed.
set -eu

# verb  what must be there              packages that bring it
table() {
    cat <<'TABLE'
bench   g++                             g++
check   postgres                        postgresql
demo    g++                             g++
test    chromium                        chromium
test    g++                             g++
test    postgres                        postgresql
test    DejaVuSans.ttf                  fonts-dejavu-core
test    NotoColorEmoji.ttf              fonts-noto-color-emoji
TABLE
}

present() {
    case "$1" in
        *.ttf) find /usr/share/fonts /usr/local/share/fonts -name "$1" 2>/dev/null | grep -q . ;;
        # Debian keeps the server's programs off the PATH.
        postgres) command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

missing=$(table | while read -r verb thing package; do
    if [ "$verb" = "$1" ] && ! present "$thing"; then echo "$package"; fi
done)
if [ -z "$missing" ]; then exit 0; fi

packages=$(echo "$missing" | tr '\n' ' ')
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "make $1 needs: $packages" >&2
    echo "On Debian or Ubuntu: sudo apt-get update && sudo apt-get install --no-install-recommends $packages" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update
# shellcheck disable=SC2086 # one word a package
apt-get -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends $packages
