"""The examples of `siliang check`: the tokens of some rows, and which of them are learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from siliang.language import Bilingual, both, local
from siliang.secrets import secret_places

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from siliang.check import CheckInput
    from siliang.tasks import Shown

MARK = "learned"  # style of learned tokens, until they are marked with brackets
AROUND = 100  # tokens on both sides of a token that are searched for a secret
HEAD, TAIL = 300, 100  # tokens shown of a long row, its end included: it shows whether the end of sequence is learned


def show_examples(console: Console, subject: CheckInput, n: int) -> None:
    """Prints the first `n` training entries as the model sees them, special tokens visible."""
    tokens = subject.train
    n = min(n, len(tokens))
    if not n:
        return
    colours = console.is_terminal
    legend = subject.task.legend[0 if colours else 1]
    special, special_zh = (", reverse: special tokens", "，反色：特殊词元") if colours else ("", "")
    console.print(both(f"Examples ({legend}{special})", f"样本示例（{local(legend)}{special_zh}）"), markup=False)
    pen = _Pen(subject.tokenizer, colours)
    in_windows = subject.examples.layout == "text" or subject.finds_spans
    entry = Bilingual("window", "窗口") if in_windows else Bilingual("entry", "条目")
    windows = Counter(tokens.column("row").tolist())
    seen: Counter[int] = Counter()
    for i in range(n):
        place, number = subject.entries([i])[0], int(tokens.column("row")[i])
        seen[number] += 1
        more = ""
        if windows[number] > 1:
            more = both(
                f", {entry} {seen[number]} of {windows[number]}",
                f"，第 {seen[number]} 个{entry.zh}（共 {windows[number]} 个）",
            )
        console.print(f"{place}{more}:", markup=False)
        line = pen.entry(subject.task.show(tokens[i], subject.examples.labels or []))
        line.rstrip()
        console.print(line)
        console.print()


def _left_out(hidden: range) -> str:
    return both(f"... {len(hidden):,} more tokens ...", f"... 省略 {len(hidden):,} 个词元 ...")


def _marked(text: Text) -> Text:
    """Plain text, with brackets around the learned parts."""
    from rich.text import Text

    inside = {i for span in text.spans if span.style == MARK for i in range(span.start, span.end)}
    out = ""
    for i, character in enumerate(text.plain):
        out += ("[[" if i in inside and i - 1 not in inside else "") + character
        out += "]]" if i in inside and i + 1 not in inside else ""
    return Text(out)


class _Pen:
    """Writes tokens in colours, or without colours with brackets."""

    def __init__(self, tokenizer: Any, colours: bool) -> None:
        self.tokenizer, self.colours = tokenizer, colours
        self.special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())

    def entry(self, shown: Shown) -> Text:
        """One entry, with its target below."""
        ids = list(shown.ids)
        text = self.tokens(ids, set(shown.learned)) if shown.tags is None else self.tagged(ids, shown.tags)
        if isinstance(shown.target, str):
            return text + self.target(shown.target)
        return text if shown.target is None else text + self.target() + self.tokens(list(shown.target), None)

    def plain(self, text: str) -> Text:
        from rich.text import Text

        return Text(text)

    def target(self, name: str = "") -> Text:
        """A new line for the target of the tokens above."""
        return self.plain("\n-> ").append(name, "green" if self.colours else "")

    def tokens(self, ids: list[int], learned: set[int] | None) -> Text:
        """The text of tokens, without the middle of a long row.

        Args:
            learned: The positions to mark. None: all positions, which then have no brackets.
        """
        from siliang.cli.shown_console import shown_text

        mark = not self.colours and learned is not None
        learned = set(range(len(ids))) if learned is None else learned
        hidden = self.hidden(ids)
        out = self.plain("")
        at = 0
        while at < len(ids):
            if at in hidden:
                out.append(f"\n{_left_out(hidden)}\n")
                at = hidden.stop
            on, special = at in learned, ids[at] in self.special
            end = at + 1
            # decode several tokens at a time: one character may consist of several tokens
            while (
                not special
                and end < len(ids)
                and end not in hidden
                and (end in learned) == on
                and ids[end] not in self.special
            ):
                end += 1
            text = self.tokenizer.decode(ids[at:end], clean_up_tokenization_spaces=False)
            if self.colours:
                out.append(text, ("green" if on else "bright_black") + (" reverse" if special else ""))
            else:
                out.append(text, MARK if mark and on else "")
            at = end
        return _marked(shown_text(out)) if mark else out

    def hidden(self, ids: list[int]) -> range:
        """The positions in the middle of a long row that are not shown. They do not begin or end within a secret."""
        start, stop = HEAD, max(HEAD, len(ids) - TAIL)
        while start < stop and self.cuts_a_secret(ids, start):
            start += 1
        while start < stop and self.cuts_a_secret(ids, stop):
            stop -= 1
        return range(start, stop)

    def cuts_a_secret(self, ids: list[int], at: int) -> bool:
        first = max(0, at - AROUND)
        cut = len(self.tokenizer.decode(ids[first:at], clean_up_tokenization_spaces=False))
        text = self.tokenizer.decode(ids[first : at + AROUND], clean_up_tokenization_spaces=False)
        return any(start < cut < end for start, end in secret_places(text))

    def tagged(self, ids: list[int], tags: Sequence[str | None]) -> Text:
        """Each token, with its tag if it has one."""
        hidden = self.hidden(ids)
        parts: list[Text] = []
        for i, (token, tag) in enumerate(zip(ids, tags, strict=True)):
            if i in hidden:
                if i == hidden.start:
                    parts.append(self.plain(_left_out(hidden)))
                continue
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False).strip()
            if not text or "\ufffd" in text:  # part of a character
                text = self.tokenizer.convert_ids_to_tokens(token)
            if tag is None:
                style = "bright_black" + (" reverse" if token in self.special else "")
            else:
                text, style = f"{text}/{tag}", "bold green" if tag != "O" else "green"
            parts.append(self.plain("").append(text, style if self.colours else ""))
        return self.plain(" ").join(parts)
