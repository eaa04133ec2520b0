"""Peaks of a model that is split over several GPUs are all of theirs."""

import torch

from trim_plugin.evaluation.peaks import in_use, peak_bytes, reset_peaks


def test_every_gpu_counts(monkeypatch):
    peaks, now = [30, 5, 7], [3, 2, 1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[device])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now[device])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.__setitem__(device, now[device]))
    assert (in_use(), peak_bytes()) == (6, 42)
    reset_peaks()
    assert peak_bytes() == 6
