"""TRL's step and loss on an accelerator, of the shapes of `accelerator.py`'s: random weights, no download, torch and TRL.

    python benchmarks/accelerator_peer.py [--json FILE] [--small]

The models are transformers' own: the student's parameters in float32 under bfloat16 autocast with gradient checkpointing,
the teacher in bfloat16, attention by `scaled_dot_product_attention`, the fused AdamW of torch: what an off-policy step of
TRL 1.16.0's `GOLDTrainer` computes. The trainer's own work around it (logging, metrics, reading rows) is not timed. The rows are those of `accelerator.random_rows`. The loss is TRL's `ULDLoss`, hybrid, merged by the chain rule.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import numpy as np

os.environ["TRL_EXPERIMENTAL_SILENCE"] = os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    """Prints and writes milliseconds and bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    import torch
    import transformers
    import trl
    from accelerator import LLAMA_1B, QWEN_4B, TINY, random_rows
    from loss import uld_loss

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    models, sizes = [], []
    for number, fields in enumerate((LLAMA_1B, QWEN_4B)):
        fields = dict(fields) | (dict(TINY, vocab_size=1000 + 24 * number) if args.small else {})
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        with device:
            dtype = torch.float32 if number == 0 else torch.bfloat16
            torch.manual_seed(number)
            models.append(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype))
        sizes.append(config.vocab_size)
    student, teacher = models
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    student.config.use_cache = teacher.config.use_cache = False
    student.train()
    teacher.eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=cuda)
    count, prompt, answer = (2, 8, 24) if args.small else (4, 512, 512)
    ids, ends = (list(map(np.stack, zip(*both))) for both in zip(*random_rows(sizes, count, prompt, answer)))
    own = range(int(0.7 * sizes[0]), sizes[0])  # entries that the teacher has not
    loss = uld_loss(range(sizes[0]), (-i if i in own else i for i in range(sizes[1])), device)
    ids = [torch.tensor(x, device=device, dtype=torch.int64) for x in ids]
    labels = [x.clone() for x in ids]
    for x in labels:
        x[:, :prompt] = -100
    spans = []
    for end in ends:
        starts = np.concatenate([np.zeros((count, 1), np.int64), end[:, :-1]], 1)
        span = np.concatenate([np.zeros((count, prompt, 2), np.int64), np.stack([starts, end], -1)], 1)
        spans.append(torch.tensor(span, device=device))
    autocast = torch.autocast(device.type, torch.bfloat16)

    def wait():
        return torch.cuda.synchronize() if cuda else None

    def teacher_logits():
        with torch.no_grad(), autocast:
            return teacher(input_ids=ids[1]).logits

    def step():
        with autocast:
            logits = student(input_ids=ids[0]).logits
            other = teacher_logits()
            value = loss(logits, other, *labels, *ids, *spans)
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    def timed(call, calls):
        call(), wait()
        seconds = []
        for _ in range(calls):
            begin = time.perf_counter()
            call()
            wait()
            seconds.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(seconds), 1e3 * (max(seconds) - min(seconds))

    def of_the_loss(held):
        hidden = [x.detach().requires_grad_(k == 0) for k, x in enumerate(held)]
        with autocast:
            value = loss(*hidden, *labels, *ids, *spans)
        value.backward()
        return value

    found = {"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__, "trl": trl.__version__,
             "transformers": transformers.__version__, "rows": []}  # fmt: skip
    print(found, flush=True)

    def add(what, value, spread=None, unit="ms"):
        found["rows"].append(dict(what=what, value=value, spread=spread, unit=unit))
        print(found["rows"][-1], flush=True)
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(found, indent=1) + "\n")

    if cuda:
        n = 8192
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        alone, _ = timed(lambda: a @ b, 10)
        together, _ = timed(lambda: [a @ b for _ in range(20)], 3)
        add("bfloat16 product 8192³, waited for after each", 2 * n**3 / alone / 1e9, unit="TFLOP/s")
        add("bfloat16 product 8192³, after twenty", 20 * 2 * n**3 / together / 1e9, unit="TFLOP/s")
        del a, b
    add("teacher's forward pass", *timed(teacher_logits, 5))
    with torch.no_grad(), autocast:
        held = [student(input_ids=ids[0]).logits, teacher_logits()]
    add("loss and gradient, from logits", *timed(lambda: of_the_loss(held), 3))
    held.clear()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    add("step", *timed(step, args.steps))
    if cuda:
        add("most bytes in use", torch.cuda.max_memory_allocated() / 2**30, unit="GiB")


if __name__ == "__main__":
    main()
