"""siliang generate: text from a trained run."""

from __future__ import annotations

from typing import Annotated

import typer

from siliang.cli.console import as_text, print_product
from siliang.cli.options import NewTokens, RepetitionPenalty, Seed, Stop, System, Temperature, TopK, TopP, sampling_of
from siliang.cli.used_run import Force, Run, TaskId, check_folders, show_hint, show_notes
from siliang.environment import importing
from siliang.language import Bilingual, both


def generate(
    run: Run,
    instruction: Annotated[
        str,
        typer.Argument(help=both("The instruction; it is put into the run's template.", "指令，会放入运行的模板。")),
    ],
    input: Annotated[str, typer.Option(help=both("The input of the instruction.", "指令的输入内容。"))] = "",
    plain: Annotated[
        bool | None,
        typer.Option(
            "--plain/--template",
            help=both(
                "Continue the text as it is, or put it into the run's template. Default: as the run was trained, plain "
                "on plain texts alone.",
                "直接续写文本，或放入运行的模板。默认与训练时相同：只用纯文本训练的运行直接续写。",
            ),
        ),
    ] = None,
    max_new_tokens: NewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    system: System = "",
    seed: Seed = None,
    base: Annotated[
        list[str] | None,
        typer.Option(
            "--base",
            metavar="[FOLDER_OR_NAME]",
            help=both(
                "Without a name: also show the base model's answer, before the tuned one. With a name: the current "
                "location of the base model.",
                "不带名称：先显示基座模型的回答，再显示微调后的回答。带名称：基座模型现在的位置。",
            ),
        ),
    ] = None,
    task_id: TaskId = None,
    force: Force = False,
) -> None:
    """Generate text with a trained run."""
    instruction, input = as_text(instruction, Bilingual("the instruction", "指令")), as_text(input, "--input")
    check_folders(run, or_models=True)
    with importing():
        from siliang.cli.show import quiet_loading
        from siliang.hardware import find_device
        from siliang.run_folder import find_run_or_model, open_trained
        from siliang.use.generate import generate as write
        from siliang.use.generate import how_it_is_asked

        quiet_loading()
    sampling = sampling_of(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    location = next((name for name in reversed(base or []) if name), None)
    with_base = "" in (base or [])
    opened = open_trained(find_run_or_model(run, base=location, force=force), device=find_device())
    opened.task_id = task_id
    show_notes(opened.trained.notes if opened.trained else ())
    if plain is None and (how := how_it_is_asked(opened.record)) is not None:
        show_hint(run, how)
    for of_base in (True, False) if with_base else (False,):
        if with_base:
            print(both("base:", "基座模型：") if of_base else both("\ntuned:", "\n微调后："))
        print_product(
            write(
                opened,
                instruction,
                input,
                system=as_text(system, "--system"),
                sampling=sampling,
                plain=plain,
                base=of_base,
            )
        )
