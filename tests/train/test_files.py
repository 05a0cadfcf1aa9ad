"""The lease on a folder, and files that are whole at every moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import grain
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from qwen_jax.errors import EnvironmentFailed
from train import files
from train.files import Lease, write_whole
from train.metrics import Recorder, read_lines


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(files, "RENEWED_EVERY", 0.05)
    monkeypatch.setattr(files, "LOST_AFTER", 0.5)


def content(folder) -> dict:
    return json.loads((folder / ".lease").read_bytes())


def test_one_owner_at_a_time(tmp_path):
    first = Lease(tmp_path / "out")
    with pytest.raises(EnvironmentFailed, match=f"another run, process {os.getpid()} on .* is at work in"):
        Lease(tmp_path / "out")
    first.release()
    first.release()
    Lease(tmp_path / "out").release()


def test_a_killed_owner_of_this_host_has_lost_it_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOST_AFTER", 1000.0)
    program = (
        f"from pathlib import Path; from train.files import Lease\nLease(Path({str(tmp_path)!r}))\n"
        "print(1, flush=True); input()"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout and owner.stdout.readline() == b"1\n"
    with pytest.raises(EnvironmentFailed, match=f"process {owner.pid}"):
        Lease(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    Lease(tmp_path).release()


def test_an_owner_on_another_host_keeps_it_as_long_as_it_renews(tmp_path, monkeypatch):
    file = os.open(tmp_path / ".lease", os.O_RDWR | os.O_CREAT)

    def renew(count: int) -> None:
        text = json.dumps({"host": "elsewhere", "process": 7, "token": "x", "renewed": count})
        os.pwrite(file, text.encode().ljust(512), 0)

    renew(0)
    began = time.monotonic()
    lease = Lease(tmp_path)  # nobody renews it
    assert time.monotonic() - began >= 0.5
    while not lease.lost:  # the other one was only away, and takes it back
        assert time.monotonic() - began < 100
        renew(1)
        time.sleep(0.01)
    lease.release()
    assert content(tmp_path)["host"] == "elsewhere"

    monkeypatch.setattr(files, "LOST_AFTER", 1000.0)
    ended = threading.Event()

    def keep_renewing() -> None:
        count = 1
        while not ended.wait(0.01):
            count += 1
            renew(count)

    thread = threading.Thread(target=keep_renewing)
    thread.start()
    with pytest.raises(EnvironmentFailed, match="process 7 on elsewhere"):
        Lease(tmp_path)
    ended.set()
    thread.join()
    os.close(file)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from qwen_jax.errors import EnvironmentFailed
from train.metrics import Recorder

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 1, 5_000, 20_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        Recorder(Path(sys.argv[1]), 400, print)
    except EnvironmentFailed as error:
        assert "file too large" in str(error)
    else:
        raise SystemExit(f"a file of more than {limit} bytes was written")
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "pad": "x" * 100}) + "\n" for i in range(1, 501)]
    path.write_text("".join(lines) + '{"step": 501, "lo')  # as a kill leaves it
    before = path.read_bytes()
    subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], check=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["metrics.jsonl"]
    Recorder(tmp_path, 400, print).close()
    assert [line["step"] for line in read_lines(path)] == list(range(1, 401))


FILLS = """
import json, resource, signal, sys
from pathlib import Path
from train.metrics import Recorder

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
said = []
recorder = Recorder(Path(sys.argv[1]), 0, said.append)
for step in range(1, 301):
    limit = 3_333 if 20 <= step < 250 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    recorder.record(step, {"loss": 1 / step, "grad_norm": float("nan") if step == 7 else 2.0})
recorder.close()
print(json.dumps(said))
"""


def test_metrics_wait_while_the_disk_is_full_and_none_is_lost(tmp_path):
    """TensorBoard's events too, as its own reader reads them."""
    done = subprocess.run([sys.executable, "-c", FILLS, str(tmp_path)], check=True, capture_output=True)
    (said,) = json.loads(done.stdout)
    assert "metrics cannot be written" in said and "(file too large); training goes on" in said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 301)) and lines[6]["grad_norm"] is None
    (file,) = (tmp_path / "tensorboard").iterdir()
    records = list(grain.experimental.TFRecordIterDataset(str(file)))
    writer = RecordWriter(str(tmp_path / "again"))  # with its checksums
    for record in records:
        writer.write(record)
    writer.close()
    assert file.read_bytes() == (tmp_path / "again").read_bytes()
    first, restart, *events = map(event_pb2.Event.FromString, records)
    assert first.file_version == "brain.Event:2" and abs(first.wall_time - time.time()) < 600
    assert restart.step == 1 and restart.session_log.status == event_pb2.SessionLog.START
    assert [event.step for event in events] == list(range(1, 301))
    for event, line in zip(events, lines, strict=True):
        found = {value.tag: value.simple_value for value in event.summary.value}
        assert found == pytest.approx({name: value for name, value in line.items() if name != "step" and value})


def test_a_failing_writer_leaves_nothing(tmp_path):
    def fail(file) -> None:
        file.write(b"half")
        raise ValueError

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ValueError):
        write_whole(tmp_path / "a", fail)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"old")]
