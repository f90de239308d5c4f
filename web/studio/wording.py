"""What the studio says of errors and of what a model cannot do, in whole sentences for people."""

from __future__ import annotations

from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import BusyError, ContextLengthError, NotReadyError, OkavangoError
from okavango.web.models import Model
from okavango.web.problems import problem_of

_REMEDIES: tuple[tuple[type[OkavangoError], str], ...] = (
    # What the studio's own buttons can do comes before what a caller of the API would.
    (ContextLengthError, "start a new conversation, or lower Max tokens"),
    (BusyError, "send it again in a moment"),
    (NotReadyError, "send it again in a few seconds"),
)


def explain(error: BaseException, request_id: str) -> str:
    """One or two sentences: what was wrong, and what to do. The place is a field of the API, and left out."""
    if not isinstance(error, OkavangoError):
        return sentence(problem_of(error, request_id).message)
    remedy = next((text for kind, text in _REMEDIES if isinstance(error, kind)), error.remedy)
    return " ".join(sentence(text) for text in (error.message, remedy) if text)


def sentence(text: str) -> str:
    """With a capital, unless it begins with a name such as emoji@2, and a stop at its end."""
    text = text.strip()
    first = text.partition(" ")[0]
    start = first.capitalize() if first.isalpha() and first.islower() else first
    return start + text[len(first) :] + ("" if text.endswith((".", "!", "?")) else ".")


def sight_note(model: Model, catalog: Catalog) -> str | None:
    """Why a model's answer about a picture may be worth little; None where it has learnt to see. Asks the
    catalog."""
    head = model.base.heads.get("image")
    if head is None or head.trained:
        return None
    if model.adapter is None:
        return (
            "The bare base cannot see pictures yet: its image head is untrained. "
            "Adapters that were trained on pictures bring a head of their own."
        )
    if "image" in catalog.resolve(str(model.adapter)).modalities:
        return None
    return f"{model.adapter} was not trained on pictures, and the image head of its base is untrained."
