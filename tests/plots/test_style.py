"""How figures are written."""

import pytest
from matplotlib.figure import Figure

from fm_stages import plots


def test_the_old_picture_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = plots.save(Figure(), tmp_path / "folder/a.png")
    old = path.read_bytes()
    assert old.startswith(b"\x89PNG")

    def killed(self, file, **options):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        plots.save(Figure(), path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]
