"""Equal inputs give equal commands, whatever the process's hash seed is."""

import os
import subprocess
import sys

SCRIPT = """
import hashlib, random
from diptych.engine.core.config import SchedulerOptions
from diptych.engine.core.types import DownCause
from tests.unit.scheduler.world import World, make_request

rng = random.Random(5)
options = SchedulerOptions(max_num_seqs=6, preemptions_max=2)
world = World((100, 0, 50, 50), num_blocks=48, options=options)
digest = hashlib.sha256()

def note(sent):
    for send in sent:
        digest.update(repr(send).encode())

attempts = {}
for i in range(400):
    what = rng.random()
    if what < 0.3:
        prompt = [rng.randrange(2)] * 48 + rng.choices(range(9), k=rng.randint(1, 80))
        request = make_request(f"r{i}", prompt, max_tokens=rng.randint(1, 60), rank=i)
        attempts[request.id] = (request, 0)
        note(world.submit(request))
    elif what < 0.4 and attempts:
        note(world.close(rng.choice(list(attempts))))
    elif what < 0.43:
        worker = rng.randrange(4)
        note(world.down(worker, rng.choice([DownCause.FAULT, DownCause.KILLED])))
        note(world.worker_up(worker, (100, 0, 50, 50)[worker]))
    else:
        worker = rng.randrange(4)
        refs = list(world.held[worker])
        if refs:
            note(world.progress(worker, released=[rng.choice(refs)]))
    for row in world.scheduler.audit().rows:
        if row.state == "lost":
            request, attempt = attempts[row.key[0]]
            attempts[row.key[0]] = (request, attempt + 1)
            note(world.submit(request, attempt=row.attempt + 1, recovering=True))
print(digest.hexdigest())
"""


def test_the_hash_seed_changes_nothing() -> None:
    digests = []
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True
        )
        digests.append(done.stdout)
    assert digests[0] == digests[1]
    assert digests[0].strip()
