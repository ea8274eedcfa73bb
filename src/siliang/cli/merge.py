"""siliang merge: merges a run into a plain model, and verifies that the outputs are equal."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from siliang.cli.used_run import Base, Run, check_folders, show_notes
from siliang.environment import importing
from siliang.language import both, local


class Dtype(StrEnum):
    """The number formats that a model can be saved in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def merge(
    run: Run,
    output: Annotated[
        Path,
        typer.Option(
            help=both(
                "Folder for the merged model; it must not exist, or must be empty.",
                "合并后模型的文件夹；事先不存在，或为空。",
            )
        ),
    ],
    dtype: Annotated[
        Dtype,
        typer.Option(
            help=both(
                "Number format of the saved model and of the verification.", "保存的数值格式，验证也用这种格式进行。"
            )
        ),
    ] = Dtype.FLOAT32,
    data: Annotated[
        str | None,
        typer.Option(
            help=both("Rows for the verification. Default: the run's data.", "用于验证的样本。默认用运行的数据。")
        ),
    ] = None,
    base: Base = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help=both(
                "Keep the model even if its outputs differ, and continue even if the base model or the data have "
                "changed since training.",
                "即使输出不一致也保留模型；基座模型或数据在训练之后变过也继续。",
            ),
        ),
    ] = False,
) -> None:
    """Merge a run's adapter into its base model, verify that the outputs are equal, and save a plain model."""
    check_folders(run)
    with importing():
        import torch

        from siliang.cli.show import quiet_loading
        from siliang.run_folder import check_empty, open_run, served_tokenizer
        from siliang.use.merge import merge as merge_run

        quiet_loading()
    check_empty(output)
    # a quantized base model would round the sum again: merge into the base model's unquantized weights
    opened = open_run(run, base=base, force=force, dtype=getattr(torch, dtype.value), quantized=False)
    proof = merge_run(opened, output, data=data, force=force)
    show_notes(opened.trained.notes if opened.trained else ())
    found = proof.in_words
    print(
        both(f"verified: {found}", f"验证一致：{found.zh}")
        if proof.holds
        else both(f"NOT VERIFIED, kept by --force: {found}", f"未能验证一致，按 --force 保留：{found.zh}")
    )
    if template := served_tokenizer(opened)[1]:
        print(both(f"chat template: {template}", f"对话模板：{local(template)}"))
    path, opener = str(output), opened.task.opened_by
    print(both(f"saved   {path}", f"已保存  {path}"))
    call = f"{opener or f'transformers.{opened.task.model.auto_class}.from_pretrained'}({path!r})"
    print(both(f"load it with {call}", f"加载方式：{call}"))
