"""``python -m tests.tools.pictures FOLDER``: the README's pictures, of made-up traffic."""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from kpmd.kpmctl import count_view, latency_view
from kpmd.kpmctl.counting import Report, Row
from kpmd.kpmctl.histogram import SLOTS, Histogram
from kpmd.kpmctl.latencies import FunctionTimes, LatencyReport
from kpmd.kpmctl.live import Line
from kpmd.kpmctl.top_sampler import Counting, Sampler
from kpmd.kpmctl.top_view import TopApp

_SIZE = (100, 30)

#: Functions, with the module they are of, and how often a second they are called, about.
_TRAFFIC: list[tuple[str, str | None, float]] = [
    ("vfs_read", None, 18_400),
    ("vfs_write", None, 9_700),
    ("vfs_getattr", None, 4_150),
    ("vfs_open", None, 3_020),
    ("vfs_statx", None, 2_480),
    ("vfs_fstat", None, 1_900),
    ("vfs_getattr_nosec", None, 4_150),
    ("vfs_readv", None, 640),
    ("vfs_writev", None, 512),
    ("vfs_iter_read", None, 233),
    ("vfs_llseek", None, 870),
    ("vfs_fsync_range", None, 61),
    ("vfs_unlink", None, 44),
    ("vfs_rename", None, 17.5),
    ("vfs_mkdir", None, 3.2),
    ("vfs_fallocate", None, 9.4),
    ("vfs_getxattr", None, 125),
    ("vfs_get_tree", None, 0.4),
    ("vfs_poll", None, 310),
    ("vfs_splice_read", None, 28),
    ("vfs_tmpfile", None, 1.6),
    ("nf_hook_slow", None, 7_300),
    ("nft_do_chain", "nf_tables", 14_600),
    ("nft_meta_get_eval", "nf_tables", 11_020),
    ("nft_counter_eval", "nf_tables", 6_900),
    ("nft_lookup_eval", "nf_tables", 2_210),
    ("nft_ct_get_eval", "nft_ct", 5_080),
]


def traffic(samples: int) -> list[Report]:
    """Reports of so many seconds of it; the same each time."""
    reports, calls = [], [0.0] * len(_TRAFFIC)
    for second in range(1, samples + 1):
        rows = []
        for number, (name, module, mean) in enumerate(_TRAFFIC):
            wave = math.sin(second / (2.5 + number % 7) + number)
            burst = 2.2 if (second + 11 * number) % 23 < 3 else 0.0
            rate = mean * max(0.55 + 0.4 * wave + burst * (number % 3) / 2, 0)
            calls[number] += rate
            rows.append(Row(int(calls[number]), rate, name, module, number))
        reports.append(Report(74, 0.0121, float(second), 0, 0, rows))
    return reports


def never_attached() -> AbstractContextManager[Counting]:
    """For a sampler that is not started."""
    raise NotImplementedError


async def top() -> str:
    """``kpmctl top 'vfs_*' 'nf*'`` after a good minute, as SVG."""
    sampler = Sampler(never_attached, 1.0)
    for report in traffic(83):
        sampler.news.put(report)
    app = TopApp(sampler, "vfs_* nf*", "ada", 1.0)
    async with app.run_test(size=_SIZE) as pilot:
        await pilot.pause()
        return app.export_screenshot(title="kpmctl top 'vfs_*' 'nf*'")


def count() -> str:
    """``kpmctl count 'vfs_*'`` after ten seconds, as SVG."""
    report = traffic(10)[-1]
    rows = sorted(
        (row for row in report.rows if row.name.startswith("vfs_")), key=lambda row: -row.calls
    )
    report = replace(report, rows=rows)
    return _picture("kpmctl count 'vfs_*'", count_view.drawn(report, _SIZE[0], 16))


def latency() -> str:
    """``kpmctl latency vfs_read`` after ten seconds, as SVG."""
    slots = [0] * SLOTS
    # Most reads find their page in memory; some wait for a disk.
    for middle, width, calls in ((9.6, 1.1, 70_000), (11.4, 0.8, 21_000), (17.2, 1.0, 900)):
        for slot in range(7, 22):
            slots[slot] += int(calls * math.exp(-(((slot - middle) / width) ** 2)))
    total = sum(calls * 3 * 2**slot // 2 for slot, calls in enumerate(slots))
    times = Histogram(sum(slots), total, 2_893_412, slots)
    function = FunctionTimes("vfs_read", None, 1, times)
    report = LatencyReport(1, 0.0018, 10.0, 0, {}, [function])
    return _picture("kpmctl latency vfs_read", latency_view.drawn(report, None, 80, None, True))


def _picture(title: str, lines: Sequence[Line]) -> str:
    console = Console(record=True, width=_SIZE[0], file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.assemble(*line), highlight=False)
    return console.export_svg(title=title, unique_id=title.split()[1])


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"count": count(), "latency": latency(), "top": asyncio.run(top())}
    for name, svg in pictures.items():
        # Without what rich would have a browser fetch from elsewhere.
        whole = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
        (folder / f"{name}.svg").write_text(whole)


if __name__ == "__main__":
    main()
