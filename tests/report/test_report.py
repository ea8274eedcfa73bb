"""Tables, answers and the page from records made by hand, whose right answers can be read off."""

from __future__ import annotations

import shlex
from html import unescape
from pathlib import Path

import pytest
from commands import refused, run
from records import SCORES, comparison, record

from siliang.cli.main import main
from siliang.records import Answer, Answers
from siliang.records.harness import HarnessTask
from siliang.report.gather import gather
from siliang.report.page import commands, disagreements, prompts, render
from siliang.report.plots import Axis, Point, scatter
from siliang.report.summary import recommend, summarize
from siliang.report.table import notes, sentences, table
from siliang.report.words import WORDS, words
from siliang.types import ConfigError


def test_the_answer(tmp_path: Path) -> None:
    data = gather([comparison(tmp_path, SCORES)])
    methods = summarize(data)
    by_label = {method.label: method for method in methods}
    score = by_label["full"].score
    assert score is not None and score.value == pytest.approx(0.91) and score.std == pytest.approx(0.01)
    # lora costs within 2% of what ia3 does and is better; wide is worse than lora at twice the memory
    assert [method.label for method in methods if method.on_front] == ["full", "lora"]
    assert by_label["stuck"].verdicts == ["majority"] * 3 and not by_label["stuck"].learned
    best = recommend(methods, data)
    assert best.best is by_label["full"] and best.tied == [by_label["lora"]]
    assert best.small is by_label["ia3"] and best.fewer == 1000 and best.share == pytest.approx(0.87 / 0.91)
    said = sentences(best, data, words("en"))
    unsure = "but these seeds do not show that it is better than lora."
    assert said[0] == f"full is ahead with accuracy 0.910 ± 0.010 over 3 seeds, {unsure}"
    assert said[1] == "ia3 reaches 96% of that with 1/1,000 of the trained parameters (4 KB saved)."
    columns, cells = table(methods, data, words("en"))
    texts = {row[0].text: dict(zip((c.key for c in columns), (c.text for c in row), strict=True)) for row in cells}
    assert list(texts) == ["full ★", "lora ★", "ia3", "wide", "stuck ⚠", "gone ⚠"]
    assert texts["lora ★"]["accuracy"] == "0.9000 ± 0.0100" and texts["lora ★"]["above"] == "300 MB"
    assert texts["lora ★"]["train_speed"] == "200" and texts["lora ★"]["eval_speed"] == "10"
    assert texts["gone ⚠"]["accuracy"] == "failed"


def test_one_class_and_nothing_learned(tmp_path: Path) -> None:
    scores = {"full": ([0.7], 1_000_000, 900), "lora": ([0.6], 1000, 400)}
    data = gather([comparison(tmp_path, scores, full=["good"] * 3)])
    assert [method.verdicts for method in summarize(data)] == [["one class"], ["majority"], []]
    said = sentences(recommend(summarize(data), data), data, words("zh"))
    assert said == [words("zh")["none"], "全部预测为样本最多的类别，准确率也有 0.6000。"]


def test_rows_on_which_methods_disagree(tmp_path: Path) -> None:
    data = gather([comparison(tmp_path, SCORES, ia3=["bad", "bad", "bad"], stuck=["bad", "good", "bad"])])
    shown, n, wrong = disagreements(data)
    assert n == 2 and wrong == [1, 1, 1, 1, 0, 0]
    assert [question.where for question in shown] == ["reviews.csv:2", "reviews.csv:1"]  # the most divided first
    assert [ok for _, ok in shown[0].answers] == [False, False, True, False, True, None]
    assert [question.text for question in prompts(data)] == ["was it?"]


def test_the_page_shows_text_as_text(tmp_path: Path) -> None:
    page = render(gather([comparison(tmp_path, SCORES)]))
    assert "<img src=x" not in page and page.count("<script>") == 1
    assert page.count("&lt;script&gt;") > 5  # of rows, answers, errors and settings
    assert "Predicted against measured peak memory" in page and "Training loss by step" in page
    assert "http" not in page.replace("http-equiv", "")


def test_plain_runs_become_a_table(tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2):
        folder = tmp_path / f"run-{seed}"
        folder.mkdir()
        record(0.8 + seed / 100, trained=1000, memory=300, seed=seed, method="lora").write(folder)
        folders.append(folder)
    data = gather(folders)
    (method,) = summarize(data)
    assert method.label == "lora" and method.score is not None and method.score.value == pytest.approx(0.815)
    other = record(0.8, trained=1000, memory=300, seed=1, method="lora")
    other.rows.eval = 21
    other.write(folders[1])
    with pytest.raises(ConfigError, match="cannot be in one table: they differ in the held-out rows"):
        gather(folders)
    other.config["task"] = "TOKEN_CLS"
    other.write(folders[1])
    with pytest.raises(ConfigError, match=r"they differ in the task \(seq_cls, token_cls\)"):
        gather(folders)


def test_runs_that_differ_in_more_than_the_seed_have_rows_of_their_own(tmp_path: Path) -> None:
    folders = []
    for name, seed, size in (("a", 1, 8), ("b", 1, 16), ("c", 2, 16), ("d", 2, 16)):
        (tmp_path / name).mkdir()
        made = record(0.8 + len(folders) / 100, trained=1000, memory=300, seed=seed, method="lora")
        made.config["train"]["batch_size"] = size
        if name == "c":
            at = "2026-01-01T00:00:00+00:00"
            made.harness = {"arc": HarnessTask(metrics={"acc,none": 0.5}, lm_eval="0.4", measured_at=at)}
        made.write(tmp_path / name)
        folders.append(tmp_path / name)
    methods = summarize(gather(folders))
    assert [m.label for m in methods] == ["lora train.batch_size=8", "lora train.batch_size=16"]
    alone, several = (m.score for m in methods)
    assert alone is not None and (alone.n, alone.std) == (1, None)
    # the two runs of the second seed count as one, with their mean
    assert several is not None and several.n == 2 and several.value == pytest.approx((0.81 + 0.825) / 2)
    assert notes(methods[1], words("en")) == ["arc/acc,none was measured for 1 of 2 seeds only"]
    (twice,) = summarize(gather([folders[0], tmp_path / "b" / ".." / "a"]))
    assert twice.label == "lora" and twice.score is not None and (twice.score.n, twice.runs) == (1, 1)


def test_axes_hold_what_they_show() -> None:
    axis = Axis.over("x", [0.6875, 0.7375])
    assert all(0 <= axis.place(v) <= 1 for v in (0.6875, 0.7375, *axis.ticks)) and len(axis.ticks) >= 3
    log = Axis.over("x", [770, 22_713_986], log=True)
    assert log.ticks == (1e3, 1e4, 1e5, 1e6, 1e7) and log.place(22_713_986) < 1
    one = Axis.over("x", [5.0])
    assert one.low < 5 < one.high
    points = [Point(f"method-{i}", i, 1.0 + i / 1000, 0.5) for i in range(4)]
    drawn = scatter(points, Axis.over("x", [p.x for p in points]), Axis.over("y", [0.4, 0.6]))
    places = {part.split('"')[0] for part in drawn.split('class="name" x="')[1:]}
    assert drawn.count('class="name"') == 4 and len(places) > 1  # names step aside for each other


def test_both_languages_say_the_same_things() -> None:
    for key, (en, zh) in WORDS.items():
        fields = {part.split("}")[0] for part in en.split("{")[1:]}
        assert fields == {part.split("}")[0] for part in zh.split("{")[1:]}, key
    with pytest.raises(ConfigError, match="must be en or zh"):
        words("fr")


def test_the_command_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = comparison(tmp_path / "out", SCORES)
    monkeypatch.setattr("sys.argv", ["siliang", "report", str(folder), "--lang", "zh"])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "准确率" in printed and "lora ★" in printed and "没有学到东西" in printed
    assert '<html lang="zh-CN">' in (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_of_runs_replaces_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison's own page is made again from its records."""
    folder = comparison(tmp_path / "out", SCORES)
    lora, here = folder / "runs" / "lora" / "seed-0", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert run("report", lora).code == 0 and (here / "report.html").is_file()
    was = (here / "report.html").read_bytes()
    for output in ([], ["--output", "report.html"]):
        says = refused("report", lora, lora.with_name("seed-1"), *output)
        assert "report.html exists already: remove it, or choose another name with --output" in says
    assert (here / "report.html").read_bytes() == was
    for output in ([], [], ["--output", folder / "report.html"]):
        assert run("report", folder, *output).code == 0
    assert "exists already" in refused("report", folder, "--output", "report.html")


def test_one_run_is_compared_with_nothing(tmp_path: Path) -> None:
    for name, seed in (("a run", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        record(0.8 + seed / 100, trained=1000, memory=400, seed=seed, method="lora").write(tmp_path / name)
    for folders, score in (([tmp_path / "a run"], "0.810"), ([tmp_path / "a run", tmp_path / "b"], "0.815 ± 0.007")):
        data = gather(folders)
        [method] = summarize(data)
        assert not method.on_front
        said = sentences(recommend([method], data), data, words("en"))
        over = " over 2 seeds" if len(folders) > 1 else ""
        assert said == [
            f"lora: accuracy {score}{over}, in 1.0 min of training and 400 MB of memory. "
            "It is not compared with another method."
        ]
        for language, title in (("en", words("en")["title_alone"]), ("zh", words("zh")["title_alone"])):
            page = render(data, language=language)
            assert title in page and words("en")["title"] not in page and words("zh")["title"] not in page
            assert "★" not in page and words("en")["no_small"] not in page
    assert f"siliang eval '{tmp_path / 'a run'}' --data other.csv" in unescape(render(gather([tmp_path / "a run"])))
    stuck = record(0.5, trained=1000, memory=400, seed=3, method="lora")
    (tmp_path / "c").mkdir()
    stuck.write(tmp_path / "c")
    rows = [Answer(where=f"r:{i}", input="a", expected="b", predicted="b", correct=True) for i in range(2)]
    Answers(rows=rows, majority=0.6, classes=2).save(tmp_path / "c" / "answers.json")
    data = gather([tmp_path / "c"])
    assert sentences(recommend(summarize(data), data), data, words("en"))[0] == words("en")["none_alone"]


def test_runs_without_the_metric(tmp_path: Path) -> None:
    """Such as runs without held-out rows: nothing is said of what they learned."""
    bare = record(0.5, trained=1000, memory=400, seed=3, method="lora")
    bare.final = {"train_loss": 0.5}
    (tmp_path / "a").mkdir()
    bare.write(tmp_path / "a")
    data = gather([tmp_path / "a"])
    said = sentences(recommend(summarize(data), data), data, words("en"))[0]
    assert said == "No run has its accuracy yet: it is not finished, failed, or has no held-out rows."


def test_commands_can_be_pasted_and_are_possible(tmp_path: Path) -> None:
    for method, merges in (("lora", True), ("full", False), ("prompt_tuning", False), ("bitfit", True)):
        folder = tmp_path / f"my {method}"
        folder.mkdir()
        record(0.8, trained=1000, memory=400, seed=1, method=method).write(folder)
        data = gather([folder])
        found = [shlex.split(command) for _, command in commands(summarize(data), data, words("en"))]
        assert [words[1] for words in found] == ["chat", "predict", "eval", *(["merge"] if merges else [])]
        assert all(words[2] == str(folder) for words in found)
        if merges:
            assert found[-1][3:] == ["--output", f"{folder}-merged"]


def test_the_table_is_narrow(tmp_path: Path) -> None:
    """The last columns stay in sight: standard deviations are below their means, titles have several lines, and the
    table is wider than the text. This test needs no browser."""
    page = render(gather([comparison(tmp_path, SCORES)]))
    assert '0.9000<span class="std">± 0.0100</span>' in page
    assert ".std { display: block;" in page and '<div class="scroll wide"' in page
    assert "#methods th, #methods td { white-space: nowrap" not in page
