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


_SENSES = {"image": ("see pictures", "pictures"), "audio": ("hear sounds", "sounds")}


def media_note(model: Model, modality: str, catalog: Catalog) -> str | None:
    """Why a model's answer about a medium may be worth little; None where it has learnt to see or hear. Asks
    the catalog."""
    head = model.base.heads.get(modality)
    if head is None or head.trained:
        return None
    sense, media = _SENSES[modality]
    if model.adapter is None:
        return (
            f"The bare base cannot {sense} yet: its {modality} head is untrained. "
            f"Adapters that were trained on {media} bring a head of their own."
        )
    if modality in catalog.resolve(str(model.adapter)).modalities:
        return None
    return f"{model.adapter} was not trained on {media}, and the {modality} head of its base is untrained."
