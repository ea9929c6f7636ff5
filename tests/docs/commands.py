"""Commands of README.md and the pages that do not run with their page, and what runs them.

A command is a launch that another test makes, or one that takes minutes or another machine.
"""

from __future__ import annotations

# The command, without comments: the test that does the same at a smaller size.
MAIN_JOB = "tests/integration/test_train.py::test_it_says_what_it_does_and_leaves_what_it_promises"
SAME_BITS = "tests/integration/test_train.py::test_a_reproducible_run_has_the_same_bits_on_any_number_of_ranks"
JSON_JOB = "tests/integration/test_launchers.py::test_a_json_is_the_whole_recipe"
ENGINES = "tests/integration/test_launchers.py::test_the_main_job_runs_unchanged"
TUTORIAL = "tests/docs/test_tutorial.py::test_the_tutorial_trains_on_two_ranks_on_one_and_under_zero"
PACKAGES = "by hand: the index of packages"
RANGE_TEST = "tests/integration/test_lr_range.py::test_the_main_job_keeps_its_checkpoints"
ELSEWHERE: dict[str, str] = {
    "make train": MAIN_JOB,
    "make test": "by hand: the test suite itself",
    "make docs": "tests/docs/test_site.py::test_the_site_builds_strictly",
    "make setup": "by hand: installs the environment that the tests run in",
    ". .venv/bin/activate": "by hand: as above",
    "pip wheel --no-deps --wheel-dir dist .": PACKAGES,
    'pip install "dist_adamw[deepspeed,tracking]" --find-links dist': PACKAGES,
    "deepspeed --num_accelerators 2 launch/train_json.py configs/deepspeed/adamwr_zero2.json": JSON_JOB,
    "NPROC=1 launch/torchrun.sh --config configs/train/reproducible.yaml": SAME_BITS,
    "NPROC=3 launch/torchrun.sh --config configs/train/reproducible.yaml": SAME_BITS,
    "NPROC=8 launch/torchrun.sh --config configs/train/reproducible.yaml": SAME_BITS,
    "dist-adamw lr-range --ranks 2 --out range.png launch/train.py --out /tmp/range": RANGE_TEST,
    "pip install -c constraints.txt -e .": PACKAGES,
    "pip install -c constraints.txt -e '.[deepspeed,tracking,transformers]'": PACKAGES,
    "CONFIG=cpu_2 launch/accelerate.sh --config configs/train/tiny.yaml --out runs/ddp": ENGINES,
    "NPROC=2 launch/torchrun.sh --config configs/train/tiny.yaml --out runs/torchrun": ENGINES,
    "CONFIG=cpu_2_zero2 launch/accelerate.sh --config configs/train/tiny.yaml --out runs/zero2": ENGINES,
    "ZERO=zero3 launch/deepspeed.sh --config configs/train/tiny.yaml --out runs/zero3": ENGINES,
    "CONFIG=gpu_8_fsdp2 launch/accelerate.sh --config configs/train/gpt2-small.yaml --data runs/corpus": "by hand: GPUs",
    "ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node 2 train.py 1": TUTORIAL,
    "ACCELERATE_USE_CPU=true python train.py 3": TUTORIAL,
    "torchrun --standalone --nproc-per-node 2 train.py 7 zero2": TUTORIAL,
    "dist-adamw inspect runs/tutorial/sample-000014336": TUTORIAL,
}

# Commands whose exit status is the answer.
STATUS: dict[str, int] = {"dist-adamw diff runs/mine runs/again": 1}
