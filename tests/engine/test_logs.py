"""The CSV tables of a run."""

from __future__ import annotations

from pyface.engine.logs import Table


def test_late_columns_come_last_and_leave_gaps(tmp_path):
    table = Table(tmp_path / "log.csv", 0)
    table.write({"step": 1, "loss": 0.123456789})
    table.write({"step": 2, "loss": 1e-9, "wrong": 3.0})
    table.write({"step": 3, "wrong": 4.0})
    assert (tmp_path / "log.csv").read_text() == "step,loss,wrong\n1,0.123457,\n2,1e-09,3\n3,,4\n"
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "log.csv"
    first = Table(path, 0)
    for step in (10, 20, 30):
        first.write({"step": step, "name": "a, b"})
    with path.open("a") as file:
        file.write("40,")  # cut off by a kill
    Table(path, 20).write({"step": 25, "name": "ü"})
    assert path.read_text(encoding="utf-8") == 'step,name\n10,"a, b"\n20,"a, b"\n25,ü\n'
