"""`flashmem-bench worker`: one shard of the grid, for a job array or any other scheduler."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from flashmem_bench.cli import options as o
from flashmem_bench.cli.run import Asked, asked, execute


@o.reads(asked)
def worker(
    asked: Asked,
    shard: Annotated[str, typer.Option("--shard", help="Which part of the samples: i/n, i from 0.", metavar="I/N")],
) -> int:
    """Run one shard of what `run` would, into a folder of its own; `merge` joins them. The same command continues.

    Example: flashmem-bench worker --shard 0/4 --suite wordmath --method vanilla,flashmem
    """
    from flashmem_bench.shards import Shard, shard_folder

    part = Shard.parse(shard)
    folder = shard_folder(asked.request.results_dir, part)
    return execute(replace(asked, request=replace(asked.request, shard=part, rows_dir=folder)))
