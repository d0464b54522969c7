"""bank.py: nothing is asked twice, and nothing stale is ever found."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import relations
from data import bank as bank_module
from data.bank import Bank
from data.pictures import save_png
from relations import MODALITIES
from runtime.files import write_tensors


class Counting:
    """A judge that counts, and whose answer is a function of photo and points."""

    size, grid = 32, 4

    def __init__(self, name="a"):
        self.name, self.pairs, self.calls = name, 0, 0
        self.questions = []                                                     # names, modalities, pairs of a call

    def digest(self):
        return self.name

    def ask(self, rgb, pts, names=None, modalities=None):
        B, P = pts.shape[:2]
        self.questions.append((names, tuple(modalities or MODALITIES), P))
        self.pairs, self.calls = self.pairs + B * P, self.calls + 1
        assert rgb.shape == (B, 3, self.size, self.size) and 0 <= rgb.min() and rgb.max() <= 1
        key = pts.flatten(2).float() @ torch.tensor([1.0, 0.37, 0.11, 0.05]) + rgb.mean((1, 2, 3))[:, None]
        prob = (key[..., None] * torch.arange(1, len(MODALITIES) + 1)).sin() / 2 + 0.5
        return prob.masked_fill(torch.tensor([m not in (modalities or MODALITIES) for m in MODALITIES]), torch.nan)


@pytest.fixture
def photos():
    return torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_each_pair_is_asked_once_and_a_second_fill_asks_nothing(tmp_path, photos):
    judge = Counting()
    bank = Bank(tmp_path, judge)
    pts, prob = bank.fill(photos, 24)
    assert judge.pairs == 5 * 24 == bank.asked and bank.known == 0
    again = bank.fill(photos, 24)
    assert judge.pairs == 5 * 24 and bank.known == 5 * 24
    assert torch.equal(pts, again[0]) and torch.equal(prob, again[1])


def test_shapes_types_and_the_judge_s_own_answers(tmp_path, photos):
    judge = Counting()
    pts, prob = Bank(tmp_path, judge).fill(photos, 20)
    assert pts.shape == (5, 20, 2, 2) and pts.dtype == torch.int64
    assert prob.shape == (5, 20, len(MODALITIES)) and prob.dtype == torch.float32
    want = torch.cat([judge.ask(photos[i:i + 1].float() / 255, pts[i:i + 1]) for i in range(5)])
    assert torch.equal(prob, want)


def test_only_the_wanted_questions_are_asked_and_the_others_later(tmp_path, photos):
    judge = Counting()
    names = [f"p{i}.jpg" for i in range(5)]
    some = Bank(tmp_path, judge).fill(photos, 8, names=names, modalities=("depth",))[1]
    assert judge.questions == [([name], ("depth",), 8) for name in names]
    assert some[..., 0].isfinite().all() and some[..., 1:].isnan().all()
    judge.questions.clear()
    every = Bank(tmp_path, judge).fill(photos, 12, names=names)[1]
    old, new = judge.questions[0], judge.questions[1]
    assert sorted((old[1:], new[1:])) == sorted(((tuple(MODALITIES)[1:], 8), (tuple(MODALITIES), 4)))
    assert torch.equal(every, Bank(tmp_path / "alone", Counting()).fill(photos, 12)[1])
    judge.questions.clear()
    assert torch.equal(Bank(tmp_path, judge).fill(photos, 12)[1], every) and not judge.questions


@pytest.mark.parametrize("packed", [False, True])
def test_what_a_judge_does_not_know_is_kept_and_not_asked_again(tmp_path, photos, packed, capsys):
    class Unsure(Counting):
        def ask(self, *args):
            prob = Counting.ask(self, *args)
            return prob.masked_fill(prob < 0.5, torch.nan)
    judge = Unsure()
    bank = Bank(tmp_path, judge)
    want = bank.fill(photos, 16)[1]
    assert 0 < want.isnan().sum() < want.numel()
    if packed:
        bank.pack()
        assert len(files(tmp_path)) == 1
    judge.questions.clear()
    again = Bank(tmp_path, judge).fill(photos, 16)[1]
    torch.testing.assert_close(again, want, rtol=0, atol=0, equal_nan=True)
    assert not judge.questions and capsys.readouterr().out == ""


def test_a_pack_and_a_single_file_of_a_photo_are_merged(tmp_path, photos):
    bank = Bank(tmp_path, Counting())
    bank.fill(photos, 16, modalities=("depth",))
    bank.pack()
    Bank(tmp_path, Counting()).fill(photos, 8, modalities=("normal",))
    silent = Counting()
    got = Bank(tmp_path, silent).fill(photos, 8, modalities=("depth", "normal"))[1]
    assert got[..., :2].isfinite().all() and got[..., 2:].isnan().all() and not silent.questions
    Bank(tmp_path, silent).pack()
    assert torch.equal(Bank(tmp_path, silent).fill(photos, 8, modalities=("depth", "normal"))[1][..., :2], got[..., :2])
    assert not silent.questions


def test_a_larger_request_asks_only_the_rest(tmp_path, photos):
    judge = Counting()
    first = Bank(tmp_path, judge).fill(photos, 10)
    assert judge.pairs == 50
    second = Bank(tmp_path, judge).fill(photos, 37)
    assert judge.pairs == 5 * 37
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b[:, :10])


def test_a_smaller_request_asks_nothing_and_keeps_the_rest(tmp_path, photos):
    judge = Counting()
    bank = Bank(tmp_path, judge)
    full = bank.fill(photos, 30)
    part = bank.fill(photos, 7)
    assert torch.equal(part[0], full[0][:, :7]) and torch.equal(part[1], full[1][:, :7])
    bank.fill(photos, 30)
    assert judge.pairs == 5 * 30


def test_answers_survive_on_disk(tmp_path, photos):
    want = Bank(tmp_path, Counting()).fill(photos, 16)
    silent = Counting()
    got = Bank(tmp_path, silent).fill(photos, 16)
    assert silent.calls == 0 and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_a_photo_is_found_whatever_its_place_in_the_batch(tmp_path, photos):
    judge = Counting()
    pts, prob = Bank(tmp_path, judge).fill(photos, 16)
    again = Bank(tmp_path, judge).fill(photos.flip(0), 16)
    assert judge.pairs == 5 * 16 and torch.equal(again[1].flip(0), prob) and torch.equal(again[0].flip(0), pts)


def test_the_same_photo_twice_is_asked_once(tmp_path, photos):
    judge = Counting()
    pts, _ = Bank(tmp_path, judge).fill(photos[[0, 0]], 16)
    assert judge.pairs == 16 and torch.equal(pts[0], pts[1])


def test_one_changed_pixel_finds_nothing(tmp_path, photos):
    judge = Counting()
    Bank(tmp_path, judge).fill(photos[:1], 16)
    changed = photos[:1].clone()
    changed[0, 0, 0, 0] ^= 1
    Bank(tmp_path, judge).fill(changed, 16)
    assert judge.pairs == 32


@pytest.mark.parametrize("name, value", [("RADIUS", 6.0), ("LINE", 2.0), ("DOT", 2.0), ("SMALLEST_MARKER", 0.5),
                                         ("RED", (0.9, 0.0, 0.0))])
def test_a_changed_marker_finds_nothing(tmp_path, photos, monkeypatch, name, value):
    judge = Counting()
    Bank(tmp_path, judge).fill(photos[:1], 16)
    assert getattr(relations, name) != value
    monkeypatch.setattr(relations, name, value)
    Bank(tmp_path, judge).fill(photos[:1], 16)
    assert judge.pairs == 32


def test_another_judge_finds_nothing(tmp_path, photos):
    first, second = Counting("a"), Counting("b")
    Bank(tmp_path, first).fill(photos[:1], 16)
    Bank(tmp_path, second).fill(photos[:1], 16)
    assert second.pairs == 16


def test_a_judge_on_another_grid_finds_nothing(tmp_path, photos):
    first, second = Counting(), Counting()
    second.grid = 2
    Bank(tmp_path, first).fill(photos[:1], 16)
    Bank(tmp_path, second).fill(photos[:1], 16)
    assert second.pairs == 16


@pytest.mark.parametrize("keep", [0, 5, 60])
def test_a_truncated_entry_is_named_and_asked_again(tmp_path, photos, capsys, keep):
    judge = Counting()
    want = Bank(tmp_path, judge).fill(photos[:2], 16)
    victim = files(tmp_path)[0]
    victim.write_bytes(victim.read_bytes()[:keep])
    got = Bank(tmp_path, judge).fill(photos[:2], 16)
    said = capsys.readouterr()
    assert str(victim) in said.out + said.err and judge.pairs == 3 * 16
    assert torch.equal(got[1], want[1])
    Bank(tmp_path, judge).fill(photos[:2], 16)
    assert judge.pairs == 3 * 16                                                # the entry was mended


def test_no_partial_file_is_left(tmp_path, photos):
    Bank(tmp_path, Counting()).fill(photos, 16)
    assert len(files(tmp_path)) == 5 and all(p.suffix == ".safetensors" for p in files(tmp_path))


def test_filling_leaves_the_global_random_state_alone(tmp_path, photos):
    before = torch.get_rng_state()
    Bank(tmp_path, Counting()).fill(photos, 16)
    assert torch.equal(before, torch.get_rng_state())


def test_points_lie_in_the_image_at_the_centres_of_the_judge_s_cells(tmp_path, photos):
    pts, _ = Bank(tmp_path, Counting()).fill(photos, 48)
    assert ((pts >= 0) & (pts < 32)).all() and (pts % 4 == 2).all()
    assert (pts[..., 0, :] != pts[..., 1, :]).any(-1).all()


def test_photos_get_different_pairs_of_their_own(tmp_path, photos):
    pts, _ = Bank(tmp_path, Counting()).fill(photos[:2], 32)
    other, _ = Bank(tmp_path / "elsewhere", Counting("b")).fill(photos[:2], 32)
    assert not torch.equal(pts[0], pts[1]) and torch.equal(pts, other)


# packs ------------------------------------------------------------------------------------------------------------

def test_packed_entries_are_found_extended_and_replace_their_files(tmp_path, photos):
    judge = Counting()
    bank = Bank(tmp_path, judge)
    want = bank.fill(photos, 20)
    bank.pack()
    assert [p.name.startswith("pack-") for p in files(tmp_path)] == [True]
    silent = Counting()
    got = Bank(tmp_path, silent).fill(photos, 20)
    assert silent.calls == 0 and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    longer = Bank(tmp_path, silent).fill(photos[:2], 33)
    assert silent.pairs == 2 * 13 and torch.equal(longer[1][:, :20], want[1][:2])
    bank.pack()
    assert len(files(tmp_path)) == 2
    again = Bank(tmp_path, silent).fill(photos, 20)
    assert silent.pairs == 2 * 13 and torch.equal(again[1], want[1])


def test_many_new_entries_are_packed_by_themselves(tmp_path):
    many = torch.randint(0, 256, (70, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    Bank(tmp_path, Counting()).fill(many, 4)
    assert len(files(tmp_path)) == 1


def test_a_judge_that_fails_has_lost_no_answer(tmp_path, photos):
    class Failing(Counting):
        def ask(self, *args):
            if self.calls == 3:
                raise ValueError("the server has gone")
            return Counting.ask(self, *args)
    with pytest.raises(ValueError, match="has gone"):
        Bank(tmp_path, Failing()).fill(photos, 16)
    judge = Counting()
    Bank(tmp_path, judge).fill(photos, 16)
    assert judge.calls == 2


def test_a_slow_judge_s_answer_is_written_when_it_is_there(tmp_path, photos, monkeypatch):
    """A kill loses what was answered in the last SECONDS; here each answer took longer."""
    seen = []

    class Slow(Counting):
        def ask(self, *args):
            seen.append(len(files(tmp_path)))
            return Counting.ask(self, *args)
    monkeypatch.setattr(bank_module, "SECONDS", 0.0)
    monkeypatch.setattr(bank_module, "ThreadPoolExecutor", lambda _: Now())
    Bank(tmp_path, Slow()).fill(photos, 16)
    assert seen == [0, 1, 2, 3, 4]


class Now:
    """An executor that does the work at once."""

    def submit(self, function, *args):
        function(*args)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_a_judge_may_be_asked_about_several_photos_at_a_time(tmp_path, photos):
    names = [f"p{i}.jpg" for i in range(5)]
    want = Bank(tmp_path / "alone", Counting()).fill(photos, 12)
    Bank(tmp_path, Counting()).fill(photos[3:4], 4)                             # lacks other answers than the rest
    judge = Counting()
    judge.photos_a_call = 2
    order = [0, 1, 0, 2, 3, 4, 4]
    got = Bank(tmp_path, judge).fill(photos[order], 12, names=[names[i] for i in order])
    assert all(torch.equal(a, b[order]) for a, b in zip(got, want, strict=True))
    assert [q[0] for q in judge.questions] == [names[:2], names[2:3], names[3:4], names[4:]]
    assert judge.pairs == 4 * 12 + 8


def test_a_disk_that_is_full_is_said_and_what_is_there_is_whole(tmp_path, photos, small_files):
    bank = Bank(tmp_path, Counting())
    with small_files(100), pytest.raises(OSError):
        bank.fill(photos, 16)
    assert files(tmp_path) == []


def test_each_process_asks_about_its_share_and_a_photo_that_cannot_be_read_is_skipped(tmp_path, monkeypatch, capsys):
    rng = torch.Generator().manual_seed(0)
    for i in range(5):
        save_png(tmp_path / "photos" / f"{i}.png", torch.rand(3, 40, 48, generator=rng).numpy())
    (tmp_path / "photos" / "3.png").write_bytes(b"no picture")
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = []
    for number in "01":
        monkeypatch.setenv("RANK", number)
        judge = Counting()
        bank_module.fill_bank(tmp_path / "bank", tmp_path / "photos", judge, 8, "cpu")
        asked.append([Path(q[0][0]).name for q in judge.questions])
    assert asked == [["0.png", "2.png", "4.png"], ["1.png"]]
    assert len(files(tmp_path / "bank")) == 2 and "skipped" in capsys.readouterr().err


def test_a_kill_between_pack_and_removal_loses_and_repeats_nothing(tmp_path, photos, monkeypatch):
    from pathlib import Path
    bank = Bank(tmp_path, Counting())
    want = bank.fill(photos, 16)

    def killed(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        bank.pack()
    monkeypatch.undo()
    assert len(files(tmp_path)) == 6
    silent = Counting()
    assert torch.equal(Bank(tmp_path, silent).fill(photos, 16)[1], want[1]) and silent.calls == 0


def test_a_packer_keeps_the_entry_that_another_writer_has_just_extended(tmp_path, photos, monkeypatch):
    bank, other = Bank(tmp_path, Counting()), Bank(tmp_path, Counting())
    bank.fill(photos[:2], 16)
    real = bank_module.write_tensors

    def write_then_extend(path, tensors):
        real(path, tensors)
        if path.name.startswith("pack-"):
            monkeypatch.setattr(bank_module, "write_tensors", real)
            other.fill(photos[:1], 40)
    monkeypatch.setattr(bank_module, "write_tensors", write_then_extend)
    bank.pack()
    assert sorted(p.name.startswith("pack-") for p in files(tmp_path)) == [False, True]
    silent = Counting()
    Bank(tmp_path, silent).fill(photos[:1], 40)
    assert silent.calls == 0


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_two_writers_at_once_leave_whole_entries(tmp_path, photos):
    import threading
    banks = [Bank(tmp_path, Counting()) for _ in range(2)]
    threads = [threading.Thread(target=lambda b=b: [b.fill(photos, n) or b.pack() for n in (4, 16, 24)]) for b in banks]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    silent = Counting()
    got = Bank(tmp_path, silent).fill(photos, 24)
    want = Bank(tmp_path / "alone", Counting()).fill(photos, 24)
    assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])


CROWD = """
import sys, time, torch
sys.path[:0] = {paths}
from test_bank import Counting
from data.bank import Bank
torch.set_num_threads(1)
role, folder, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
photos = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
end, n = time.monotonic() + seconds, 16
while time.monotonic() < end:
    bank = Bank(folder, Counting())
    if role == "pack":
        bank.pack()
    else:
        pts, prob = bank.fill(photos.roll(int(role), 0), n)
        want = torch.cat([Counting().ask(p[None] / 255.0, q[None]) for p, q in zip(photos.roll(int(role), 0), pts)])
        assert torch.allclose(prob, want, atol=1e-4)
        n += 1
"""


def test_two_writers_and_a_packer_in_processes_of_their_own_all_live_and_lose_nothing(tmp_path):
    here = Path(__file__).resolve().parent
    code = CROWD.format(paths=[str(here), str(here.parent)])
    crowd = [subprocess.Popen([sys.executable, "-c", code, role, str(tmp_path), "4"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) for role in ("0", "3", "pack", "pack")]
    told = [process.communicate(timeout=120) for process in crowd]
    assert [process.returncode for process in crowd] == [0] * 4, [err.decode()[-2000:] for _, err in told]
    assert not any(b"damaged" in out for out, _ in told), told                  # a file that went away is not that
    judge = Counting()
    rng = torch.Generator().manual_seed(0)
    Bank(tmp_path, judge).fill(torch.randint(0, 256, (6, 3, 32, 32), generator=rng, dtype=torch.uint8), 16)
    assert judge.pairs == 0
    assert not [p for p in files(tmp_path) if p.suffix == ".damaged"]


def test_files_that_are_no_entries_are_left_alone(tmp_path, photos):
    bank = Bank(tmp_path, Counting())
    bank.fill(photos[:1], 4)
    for path in files(tmp_path):
        path.with_name(f"._{path.name}").write_bytes(b"twin")                   # of macOS
    (bank.folder / "notes.safetensors").write_bytes(b"")
    bank.pack()
    assert Bank(tmp_path, Counting()).fill(photos[:1], 4)[1].isfinite().all()
    left = [p.name for p in files(tmp_path)]
    assert len(left) == 3 and "notes.safetensors" in left and sum(name.startswith("._") for name in left) == 1


def test_a_damaged_pack_is_named_and_asked_again(tmp_path, photos, capsys):
    judge = Counting()
    bank = Bank(tmp_path, judge)
    bank.fill(photos, 16)
    bank.pack()
    victim, = files(tmp_path)
    victim.write_bytes(victim.read_bytes()[:50])
    Bank(tmp_path, judge).fill(photos, 16)
    assert str(victim) in capsys.readouterr().out and judge.pairs == 2 * 5 * 16
    assert not victim.exists() and victim.with_suffix(".damaged").stat().st_size == 50
    Bank(tmp_path, judge).fill(photos, 16)
    assert capsys.readouterr().out == "" and judge.pairs == 2 * 5 * 16          # told once


@pytest.mark.parametrize("packed", [False, True])
def test_a_bit_that_changed_is_noticed_and_its_photos_are_asked_about_again(tmp_path, photos, capsys, packed):
    bank = Bank(tmp_path, Counting())
    want = bank.fill(photos, 8)
    if packed:
        bank.pack()
    path = min(bank.folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-2] ^= 1                                                            # of a probability
    path.write_bytes(content)
    again = Bank(tmp_path, Counting())
    got = again.fill(photos, 8)
    said = capsys.readouterr().out
    assert str(path) in said and "damaged" in said and again.asked == 8 * (len(photos) if packed else 1)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_400_000_answers_are_under_20_mb_and_are_read(tmp_path):
    """2500 photos x 40 pairs x 4 questions; keys made up, since reading photos is not the bank's share."""
    bank, n = Bank(tmp_path, Counting()), 2500
    rng = torch.Generator().manual_seed(0)
    write_tensors(bank.folder / "pack-x.safetensors", dict(
        counts=torch.full((n,), 40), keys=torch.randint(0, 256, (n, 12), generator=rng, dtype=torch.uint8),
        pts=torch.zeros(40 * n, 2, 2, dtype=torch.int16), prob=torch.rand(40 * n, 4, generator=rng)))
    size = sum(p.stat().st_size for p in files(tmp_path))
    assert len(bank._read_packs()) == n and size < 20e6 / 4
