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
SESSION = "tests/docs/test_first_session.py::test_the_commands_print_what_the_page_shows"
GPUS = "by hand: GPUs"
PACKAGES = "by hand: the index of packages"
RANGE_TEST = "tests/integration/test_lr_range.py::test_the_main_job_keeps_its_checkpoints"
RANDOM_OPTIMIZER = "tests/distributed/test_random_optimizer.py::test_random_sequences"
UPDATE_PHASE = "tests/unit/test_benchmarks.py::test_update_phase"
THIRD_PARTY = "tests/distributed/test_third_party.py::test_accelerate_script"
COMPLETION = "tests/unit/test_cli.py::test_completion_in_bash"
VERIFY = "tests/unit/test_cli_checkpoints.py::test_the_newest_whole_one"
KILLS = "tests/distributed/test_folder.py::test_killed_at_any_instant_nothing_is_lost"
RANGE = "dist-adamw lr-range --ranks 2"
SMALL = "--config configs/train/small.yaml"
RECIPES, ROWS = "python -m benchmarks.recipes", "benchmarks/results/recipes.jsonl"
TYPED = (
    "python3 -m venv env",
    ". env/bin/activate",
    'pip install --quiet torch==2.13.0 "dist_adamw[tracking]" --find-links dist',
    "sed 's/decay_length/decay_lenght/' recipe.yaml > typo.yaml",
    "dist-adamw check typo.yaml",
    "dist-adamw check recipe.yaml --ranks 5",
    "export ACCELERATE_USE_CPU=true",
    "torchrun --standalone --nproc-per-node 2 train.py",
    "torchrun --standalone --nproc-per-node 3 train.py",
    "dist-adamw inspect checkpoints --verify",
    "dist-adamw export checkpoints weights.safetensors",
    "python use.py",
    "dist-adamw export checkpoints state.pt --kind torch",
    "python -c \"import torch; print(list(torch.load('state.pt')))\"",
)
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
    "CONFIG=gpu_8_fsdp2 launch/accelerate.sh --config configs/train/gpt2-small.yaml --data runs/corpus": GPUS,
    "ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node 2 train.py 1": TUTORIAL,
    "ACCELERATE_USE_CPU=true python train.py 3": TUTORIAL,
    "torchrun --standalone --nproc-per-node 2 train.py 7 zero2": TUTORIAL,
    "dist-adamw inspect runs/tutorial/sample-000014336/dist_adamw": TUTORIAL,
    f"{RANGE} --highest 10 --updates 140 --out lr-range.png launch/train.py {SMALL} --out /tmp/range": RANGE_TEST,
    **dict.fromkeys(TYPED, SESSION),
    "accelerate launch --num_processes 8 train.py": GPUS,
    "ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node 2 train.py": SESSION,
    "sed 's/^torch==.*/torch==2.12.1/' constraints.txt > build/constraints.txt": PACKAGES,
    "uv venv --python 3.12 build/py312": PACKAGES,
    'uv pip install --python build/py312 -c build/constraints.txt "dist_adamw[dev] @ '
    'file://$PWD/dist/dist_adamw-0.1.0-py3-none-any.whl"': PACKAGES,
    "build/py312/bin/python tests/installed/check.py": PACKAGES,
    "pre-commit install": "by hand: changes the repository's hooks",
    "make check": "by hand: a part of the test suite",
    "make coverage": "by hand: the test suite itself",
    "python -m tests.random.optimizer --sequences 10000 --seed 1": RANDOM_OPTIMIZER,
    "python -m tests.random.clock --loops 10000 --seed 1": "tests/distributed/test_random_clock.py::test_random_loops",
    "python -m tests.fuzz": "tests/unit/test_fuzz.py::test_a_configuration_is_read_or_a_sentence",
    "python -m tests.kills --kills 40": KILLS,
    "python -m tests.third_party": THIRD_PARTY,
    "python -m tests.third_party --only accelerate --ranks 2": THIRD_PARTY,
    "python -m tests.third_party --torch-tests ~/pytorch": "by hand: a checkout of torch",
    "mkdir -p ~/.local/share/bash-completion/completions": COMPLETION,
    "dist-adamw completion bash > ~/.local/share/bash-completion/completions/dist-adamw": COMPLETION,
    "dist-adamw inspect runs/mine/checkpoints --verify --json | jq -r .checkpoint": VERIFY,
    "python -m tests.house": "tests/unit/test_rooms.py::test_the_house_stays_within_its_limits",
    f"{RECIPES}_report {ROWS} --docs docs": "tests/unit/test_recipes.py::test_the_report_is_made_from_the_rows",
    **{
        f"{RECIPES} {experiment} --out {ROWS}": "tests/unit/test_recipes.py::test_an_interrupted_sweep_continues"
        for experiment in ("decay", "anytime", "branches", "snapshots")
    },
    "python -m benchmarks.update_phase --only time --workloads gpt --groups one --gradients allocated --rounds 9 "
    '--accumulation 4 --engines DistAdamW "DistAdamW, reproducible" "DDP + AdamW"': UPDATE_PHASE,
}

# Commands whose exit status is the answer.
STATUS: dict[str, int] = {"dist-adamw diff runs/mine runs/again": 1}
