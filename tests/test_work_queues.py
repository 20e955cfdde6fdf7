"""Which queue a release is sent to, and which a worker serves."""

import re

import pytest

from configs.errors import BadInputError
from configs.schema import Evaluate
from tasks.fleet.work_queues import QUEUES, check_fits, memory_needed, queue_for, queues_of
from tasks.runtime.device import Gpu
from tasks.values import Found

QWEN = Found(
    kind="hub",
    name="Qwen3-1.7B",
    path=None,
    commit="c" * 40,
    files={"model.safetensors": 3_441_185_608, "tokenizer.json": 11_422_654},
    config={"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "dtype": "bfloat16"},
)
# GiB that the driver leaves of a GPU with ECC on: T4, L4, A100, L40S, H100, H200.
SOLD = {16: 14.56, 24: 22.0, 40: 39.4, 48: 44.4, 80: 79.1, 141: 139.8}


def test_memory_is_no_less_than_was_seen_and_not_much_more() -> None:
    seen = 4.9e9  # of an H100, while nf4 was evaluated: benchmarks/RESULTS.md
    assert seen < memory_needed(QWEN, Evaluate()) < 1.3 * seen
    assert memory_needed(QWEN, Evaluate(), batch_size=1) < memory_needed(QWEN, Evaluate())
    assert memory_needed(QWEN, Evaluate(window=4096)) > memory_needed(QWEN, Evaluate())
    nested = QWEN.model_copy(update={"config": {"text_config": QWEN.config}})
    assert memory_needed(nested, Evaluate()) == memory_needed(QWEN, Evaluate())


@pytest.mark.parametrize(("size", "gib"), SOLD.items())
def test_a_run_fits_on_every_gpu_that_serves_its_queue(size: int, gib: float) -> None:
    memory = int(gib * 2**30)
    served = queues_of(memory)
    assert f"gpu-{size}gb" in served
    assert set(served) <= set(QUEUES)
    for queue in served[1:]:
        needed = int(0.9e9 * int(re.findall(r"\d+", queue)[0]))
        assert queue_for(needed) == queue
        assert needed <= memory
    assert queues_of(None) == ["default", "cpu"]
    assert "control" not in served


def test_what_fits_nowhere_is_refused_in_a_line() -> None:
    large = QWEN.model_copy(update={"files": {"model.safetensors": 141_000_000_000}})
    with pytest.raises(BadInputError, match="about 144 GB on one GPU, and the largest queue is gpu-141gb"):
        queue_for(memory_needed(large, Evaluate()))
    small = Gpu(name="NVIDIA P4", memory_bytes=4_000_000_000)
    with pytest.raises(BadInputError, match=r"about 5\.4 GB, and NVIDIA P4 has 4\.0 GB; send it to the queue gpu-8gb"):
        check_fits(QWEN, Evaluate(), [small])
    check_fits(QWEN, Evaluate(), [small, small])  # it is spread over both
    check_fits(QWEN, Evaluate(), [])
