from __future__ import annotations

import hashlib
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import soundfile

from acestep_ray.doctor import artefacts, output
from acestep_ray.doctor.artefacts import check_cache, check_checkpoint, check_dataset, check_tracking
from acestep_ray.doctor.output import check_output
from acestep_ray.models.checkpoint import ACE_STEP_V1, LYRIC_VOCAB_VARIABLE, CheckpointDir
from acestep_ray.storage import Store
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from tests.cache.rows import song_row, write_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> CheckpointDir:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def released(tiny, tmp_path, monkeypatch) -> CheckpointDir:
    """A copy of the tiny checkpoint, taken for the released one."""
    copy = CheckpointDir.open(shutil.copytree(tiny.path, tmp_path / "released"))
    for name in list(ACE_STEP_V1.files):
        if (copy.path / name).is_file():
            sha256 = hashlib.sha256((copy.path / name).read_bytes()).hexdigest()
            monkeypatch.setitem(ACE_STEP_V1.files, name, sha256)
        else:
            monkeypatch.delitem(ACE_STEP_V1.files, name)
    return copy


class TestCheckpoint:
    def test_the_released_one_is_known_by_its_configurations_or_by_all_of_it(self, released):
        for fingerprint, what in ((False, "every configuration"), (True, "every file")):
            (finding,) = check_checkpoint(released, fingerprint=fingerprint)
            assert finding.level == "ok"
            assert f"{what} is the released one's" in finding.found
            assert "SSL mert, m-hubert" in finding.found

    def test_changed_weights_are_found_when_they_are_read(self, released):
        weights = released.path / "music_vocoder/diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        (unread,) = check_checkpoint(released, fingerprint=False)
        (read,) = check_checkpoint(released, fingerprint=True)
        assert (unread.level, read.level) == ("ok", "warning")
        assert "music_vocoder/diffusion_pytorch_model.safetensors" in read.found

    def test_another_checkpoint_is_no_fault(self, tiny):
        (finding,) = check_checkpoint(tiny, fingerprint=False)
        assert finding.level == "ok"
        assert "not the released one" in finding.found

    def test_what_precompute_will_miss_is_said(self, released, monkeypatch):
        monkeypatch.delenv(LYRIC_VOCAB_VARIABLE, raising=False)
        shutil.rmtree(released.path / "mert")
        shutil.rmtree(released.path / "lyric_tokenizer")
        first, vocabulary, ssl = check_checkpoint(CheckpointDir.open(released.path), fingerprint=False)
        assert [first.level, vocabulary.level, ssl.level] == ["ok", "problem", "warning"]
        assert "checkpoint fetch" in vocabulary.remedy
        assert "--only mert" in ssl.remedy


class TestDataset:
    @pytest.fixture
    def songs(self, tmp_path):
        """Seven of them."""
        wave = np.sin(np.arange(8000) / 10)
        for i in range(7):
            soundfile.write(tmp_path / f"{i}.wav", wave, 8000)
            (tmp_path / f"{i}_prompt.txt").write_text("pop")
        return tmp_path

    def test_songs_are_counted_and_some_are_opened(self, songs):
        finding = check_dataset(str(songs))
        assert finding.level == "ok"
        assert "7 songs" in finding.found
        assert "the audio of 5 looked at opens" in finding.found

    def test_some_that_do_not_open_are_a_warning_and_all_a_problem(self, songs):
        (songs / "6.wav").write_bytes(b"no audio")
        some = check_dataset(str(songs))
        assert some.level == "warning"
        assert "of 5 looked at, 1 do not open" in some.found
        assert "6.wav" in some.found
        for path in songs.glob("*.wav"):
            path.write_bytes(b"no audio")
        assert check_dataset(str(songs)).level == "problem"

    def test_what_is_no_dataset_is_a_problem_with_what_to_do(self, tmp_path):
        finding = check_dataset(str(tmp_path / "nowhere"))
        assert (finding.level, "nowhere" in finding.found, bool(finding.remedy)) == ("problem", True, True)


class TestCache:
    @pytest.fixture
    def cache(self, tmp_path, tiny) -> Store:
        width = tiny.transformer_config.text_embedding_dim
        return write_rows(Store.at(tmp_path / "cache"), [song_row(key, text_dim=width) for key in "abcdefgh"])

    def test_songs_are_counted_and_some_are_read(self, cache):
        (finding,) = check_cache(cache.url, None, fingerprint=False)
        assert finding.level == "ok"
        assert "8 songs with latents, text, ssl" in finding.found
        assert "5 were read" in finding.found

    def test_a_damaged_song_is_a_problem(self, cache):
        (part,) = (cache.path / "samples").iterdir()
        content = part.read_bytes()
        part.write_bytes(b"?" * 2000 + content[2000:])
        (finding,) = check_cache(cache.url, None, fingerprint=False)
        assert finding.level == "problem"
        assert "of 5 read, 1 are damaged" in finding.found
        assert "cache verify" in finding.remedy

    def test_what_is_no_cache_is_a_problem(self, tmp_path):
        (finding,) = check_cache(str(tmp_path), None, fingerprint=False)
        assert finding.level == "problem"
        assert "this is not a feature cache" in finding.found

    def test_the_checkpoint_that_computed_it_is_told_from_another(self, cache, tiny, monkeypatch):
        *_, unread = check_cache(cache.url, tiny, fingerprint=False)
        assert "--fingerprint" in unread.found
        models = {part: tiny.fingerprint(part) for part in ("codec", "text_encoder", "mert", "m-hubert")}

        def with_models(models):
            read = artefacts.CacheIndex.open

            def opened(place):
                index = read(place)
                index.manifest["checkpoint"] = models
                return index

            return opened

        monkeypatch.setattr("acestep_ray.cache.reader.CacheIndex.open", with_models(models))
        *_, same = check_cache(cache.url, tiny, fingerprint=True)
        assert (same.level, "codec, text_encoder, mert, m-hubert" in same.found) == ("ok", True)

    def test_another_encoder_or_width_is_a_problem(self, cache, tiny, tmp_path):
        index = artefacts.CacheIndex.open(cache)
        index.manifest["checkpoint"] = {"codec": "0" * 64, "text_encoder": tiny.fingerprint("text_encoder")}
        other = artefacts._check_encoders(index, tiny, True)
        assert other.level == "problem"
        assert "another codec" in other.found
        narrow = write_rows(Store.at(tmp_path / "narrow"), [song_row("a", text_dim=6)])
        *_, finding = check_cache(narrow.url, tiny, fingerprint=False)
        assert finding.level == "problem"
        assert "width 6" in finding.found


class TestTracking:
    def test_a_database_that_is_not_there_yet_is_not_made(self, tmp_path):
        finding = check_tracking(f"sqlite:///{tmp_path}/mlflow.db")
        assert (finding.level, "the first run makes" in finding.found) == ("ok", True)
        assert list(tmp_path.iterdir()) == []

    def test_a_file_that_is_no_database_is_a_problem(self, tmp_path):
        (tmp_path / "mlflow.db").write_text("no database" * 1000)
        assert check_tracking(f"sqlite:///{tmp_path}/mlflow.db").level == "problem"

    def test_a_server_that_answers_is_right(self):
        class Answering(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_GET = do_POST

            def log_message(self, *_):
                pass

        with HTTPServer(("127.0.0.1", 0), Answering) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            finding = check_tracking(f"http://127.0.0.1:{server.server_port}")
            server.shutdown()
            thread.join()
        assert finding.level == "ok"
        assert f"MLflow answers at http://127.0.0.1:{server.server_port}" in finding.found

    def test_a_server_that_does_not_answer_is_a_problem_without_its_password(self):
        finding = check_tracking("http://me:password@127.0.0.1:9")
        assert finding.level == "problem"
        assert "127.0.0.1:9 does not answer" in finding.found
        assert "password@" not in finding.render()

    def test_none_is_off(self):
        assert check_tracking("none").level == "ok"


class TestOutput:
    @pytest.mark.parametrize("place", ["", "not/yet/there"])
    def test_a_directory_is_written_and_nothing_stays(self, tmp_path, place):
        finding = check_output(str(tmp_path / place))
        assert (finding.level, list(tmp_path.iterdir())) == ("ok", [])

    def test_object_storage_is_written_and_nothing_stays(self, s3):
        url = s3.fresh()
        assert check_output(url).level == "ok"
        assert {"PUT", "GET"} <= set(s3.requests(url))
        assert Store.at(url).names() == {}

    def test_what_cannot_be_written_is_a_problem(self, tmp_path):
        (tmp_path / "file").write_text("")
        finding = check_output(str(tmp_path / "file"))
        assert (finding.level, bool(finding.remedy)) == ("problem", True)
        missing = check_output("s3://no-such-bucket-here/exps")
        assert missing.level == "problem"

    def test_storage_that_gives_other_bytes_back_is_a_problem(self, tmp_path, monkeypatch):
        monkeypatch.setattr(output.Store, "read_bytes", lambda store, name: b"other")
        assert check_output(str(tmp_path)).level == "problem"
