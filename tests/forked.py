"""A process that is forked while another thread infers under a guide; run by `test_threads`."""

from __future__ import annotations

import os
import sys
import threading
import time

import pyro
import pyro.distributions as dist
import torch

import langppl as lp
from langppl.lm import requests
from langppl.program import scheduler
from langppl.testing import tiny_lm

torch.set_num_threads(1)
LM = tiny_lm("ab.", seed=1)
is_at_work, may_go_on = threading.Event(), threading.Event()


def story() -> None:
    z = lp.sample("z", lp.LMString(LM, "a", stop=".", max_tokens=4))
    lp.sample("seen", lp.LMString(LM, f"a{z}"), obs="ab")


def inside() -> None:
    with LM.adapter(guide.adapter), pyro.poutine.block():
        is_at_work.set()
        may_go_on.wait()


guide = lp.GFlowNetGuide(LM, rank=2)
guide.fit(story, steps=8, batch=8, learning_rate=1e-1, progress=False)
alone = lp.infer(story, num_samples=20).log_evidence
LM.memo.clear()
thread = threading.Thread(target=scheduler.run, args=([inside],))
thread.start()
is_at_work.wait()
# One that waits stands in line, and is not there in the fork either.
before = requests._last
waiting = threading.Thread(target=lp.infer, args=(story,), kwargs={"progress": False})
waiting.start()
while requests._last is before:
    time.sleep(0.001)
child = os.fork()
if child == 0:
    assert LM.active_adapter is None
    again = lp.infer(story, num_samples=20).log_evidence
    assert abs(again - alone) < 1e-5, (again, alone)
    assert pyro.sample("free", dist.Delta(torch.tensor(1.0))) == 1.0
    print("inferred", flush=True)
    os._exit(0)
os.waitpid(child, 0)
may_go_on.set()
thread.join()
waiting.join()
again = lp.infer(story, num_samples=20).log_evidence
sys.exit(0 if abs(again - alone) < 1e-5 else 1)
