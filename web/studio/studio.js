// Whatever carries data-copy copies it when it is clicked, or when Enter is pressed on it.
(() => {
  const copy = async (element) => {
    const text = decodeURIComponent(element.dataset.copy);
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(text);
    } else {
      // A page that is served over plain HTTP from another machine has no clipboard of its own.
      const field = document.createElement("textarea");
      field.value = text;
      document.body.append(field);
      field.select();
      document.execCommand("copy");
      field.remove();
    }
    element.classList.add("okv-copied");
    setTimeout(() => element.classList.remove("okv-copied"), 1200);
  };
  const copyFrom = (event) => {
    const element = event.target.closest?.("[data-copy]");
    if (!element) return;
    event.preventDefault();
    event.stopPropagation();
    copy(element);
  };
  document.addEventListener("click", copyFrom, true);
  document.addEventListener("keydown", (event) => event.key === "Enter" && copyFrom(event), true);
})();
