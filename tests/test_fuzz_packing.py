import numpy as np
import pytest

from tests.messy_folder import fill, made_files, pack_and_check, real_files

PEAK_MIB = 400


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow, of odd metadata
def test_of_a_folder_of_damaged_and_odd_files_all_that_is_accepted_decodes(tmp_path, test_data):
    # The long form, with as many folders as one likes, is tests/bench/fuzz_packing.py.
    pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")
    rng = np.random.default_rng(0)
    sources = made_files(rng) + real_files(test_data, limit=40)
    fill(tmp_path / "in", sources, 150, rng)
    outcome, peak_mib, far = pack_and_check(tmp_path, limit_s=120)
    assert far == {} and 50 < peak_mib < PEAK_MIB
    assert outcome["crashed"] == outcome["took too long"] == 0
    assert outcome["stored"] > 30 and outcome["refused"] > 30 and outcome["ignored"] > 5
