"""Rows that must not be learned as they are: preferences, wrong answers, pictures and sound."""

from __future__ import annotations

from siliang.config import Columns
from siliang.data.cells import BadRow, Values, given
from siliang.language import Bilingual

PREFERENCES = ("rejected", "chosen", "rejected_response", "rejected_responses", "rejected_messages")
WANTED = ("label", "kto_tag")  # KTO: false marks a wrong answer
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
PLACEHOLDERS = ("<image>", "<video>", "<audio>")


def refuse_other_lessons(values: Values, c: Columns, columns: tuple[str, ...]) -> None:
    """Refuses a row that holds preferences, an answer marked as wrong, or pictures, sound or video.

    Args:
        columns: The columns that the layout reads. A preference column among them was chosen by the user as the answer.

    Raises:
        BadRow: It is such a row.
    """
    if given(values.get("positive_messages")):
        raise BadRow(
            Bilingual(
                "has 'positive_messages': texts that belong together, from which task=embedding and task=reranker "
                "learn",
                "有 'positive_messages'：相互对应的文本，这样的数据用 task=embedding 或 task=reranker 学习",
            )
        )
    if not any(name in columns for name in PREFERENCES):
        for name in PREFERENCES:
            if given(values.get(name)):
                raise BadRow(
                    Bilingual(
                        f"has {name!r}: a better and a worse answer, from which task=preference learns; "
                        "to learn one of them, name its column with data.columns, or remove the other",
                        f"有 {name!r}：较好和较差的答案，这样的数据用 task=preference 学习；"
                        "若只学习其中之一，请用 data.columns 指定它的列，或去掉另一列",
                    )
                )
    for name in WANTED:
        value = values.get(name)
        if name == "label" and c.label != "label":
            continue  # the user has named another column as the label
        if (isinstance(value, int | float) and value == 0) or as_word(value) in ("false", "0"):
            raise BadRow(
                Bilingual(
                    f"has {name!r}: {value!r}, which marks its answer as wrong (KTO), and siliang learns every answer "
                    f"as right; where {name!r} means something else, rename it",
                    f"有 {name!r}: {value!r}，表示其答案是错的（KTO），而 siliang 把每个答案都当作正确的来学习；"
                    f"若 {name!r} 另有含义，请改名",
                )
            )
    refuse_media({name: value for name, value in values.items() if name not in columns})


def refuse_media(values: Values) -> None:
    """Refuses a row with pictures, sound or video."""
    for name in MEDIA:
        if given(values.get(name)):
            raise BadRow(text_only(name))


def text_only(name: str) -> Bilingual:
    return Bilingual(f"has {name!r}: siliang trains on text alone", f"有 {name!r}：siliang 只用文本训练")


def as_word(value: object) -> str:
    """A text in lower case without blanks around it; an empty text for any other value."""
    return value.strip().lower() if isinstance(value, str) else ""


def media_in(text: str) -> str | None:
    """The placeholder of a picture, a video or a sound in a question; `<video>` and `<audio>` within prose are HTML."""
    bare = text.strip()
    for mark in PLACEHOLDERS:
        if bare.startswith(mark) or bare.endswith(mark) or (mark == "<image>" and mark in text):
            return mark
    return None
