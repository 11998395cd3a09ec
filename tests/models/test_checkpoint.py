from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.models import fingerprints
from acestep_ray.models.checkpoint import (
    ACE_STEP_V1,
    LYRIC_VOCAB_VARIABLE,
    CheckpointDir,
    Release,
    fetch_checkpoint,
)
from acestep_ray.models.transformer import is_unused_parameter

TRANSFORMER_WEIGHTS = "ace_step_transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(checkpoint.path, tmp_path / "copy")


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestOpen:
    def test_a_complete_directory_opens_with_its_ssl_models(self, checkpoint):
        assert CheckpointDir.open(str(checkpoint.path)).ssl_names == ("mert", "m-hubert")

    def test_everything_that_is_missing_or_broken_is_listed_in_one_message(self, folder):
        shutil.rmtree(folder / "music_vocoder")
        (folder / "music_dcae_f8c8/config.json").write_text("{broken")
        (folder / "umt5-base/tokenizer.json").unlink()
        (folder / "mert/model.safetensors").unlink()
        weights = folder / TRANSFORMER_WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1000])
        with pytest.raises(InputError) as error:
            CheckpointDir.open(folder)
        message = str(error.value)
        for part in (
            "music_vocoder/ is missing",
            "music_dcae_f8c8/config.json: ",
            "umt5-base/tokenizer.json: ",
            "mert: no weights",
            f"{TRANSFORMER_WEIGHTS}: ",
        ):
            assert part in message
        assert message.count("\n  - ") == 5
        assert f"acestep-ray checkpoint fetch {folder}" in message
        assert "acestep-ray checkpoint tiny" in message

    def test_a_directory_that_does_not_exist_is_named(self, tmp_path):
        with pytest.raises(InputError, match="nowhere"):
            CheckpointDir.open(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        ("file", "key"),
        [
            ("umt5-base", "d_model"),
            ("music_dcae_f8c8", "latent_channels"),
            ("mert", "hidden_size"),
            ("mhubert", "hidden_size"),
        ],
    )
    def test_a_part_of_another_width_than_the_transformers_is_named(self, folder, file, key):
        edit_json(folder / file / "config.json", **{key: 99})
        with pytest.raises(InputError, match=f"{file}/config.json: `{key}` is 99"):
            CheckpointDir.open(folder)

    @pytest.mark.parametrize(
        "change", [{"inner_dim": 65}, {"lyric_encoder": {"sizes": 3}}, {"ssl_names": ["mert", "other"]}]
    )
    def test_an_impossible_transformer_configuration_is_named(self, folder, change):
        edit_json(folder / "ace_step_transformer/config.json", **change)
        with pytest.raises(InputError, match=r"ace_step_transformer/config\.json"):
            CheckpointDir.open(folder)

    def test_an_impossible_vocoder_configuration_is_named(self, folder):
        edit_json(folder / "music_vocoder/config.json", use_template=True)
        with pytest.raises(InputError, match=r"music_vocoder/config\.json: .*use_template"):
            CheckpointDir.open(folder)

    def test_without_ssl_folders_there_are_no_ssl_encoders(self, folder):
        shutil.rmtree(folder / "mert")
        assert list(CheckpointDir.open(folder).load_ssl_encoders()) == ["m-hubert"]
        shutil.rmtree(folder / "mhubert")
        assert CheckpointDir.open(folder).load_ssl_encoders() == {}


class TestLoadTransformer:
    def test_every_parameter_is_the_files_and_none_is_left_on_the_meta_device(self, checkpoint):
        weights = load_file(checkpoint.path / TRANSFORMER_WEIGHTS)
        parameters = dict(checkpoint.load_transformer().named_parameters())
        used = {name for name in weights if not is_unused_parameter(name)}
        assert parameters.keys() == used
        assert len(used) < len(weights)
        for name, parameter in parameters.items():
            assert parameter.requires_grad
            assert torch.equal(parameter, weights[name])

    def test_the_dtype_asked_for_is_the_dtype_of_all(self, checkpoint):
        transformer = checkpoint.load_transformer(dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}

    def test_changing_a_loaded_weight_leaves_the_file_alone(self, checkpoint):
        before = hashlib.sha256((checkpoint.path / TRANSFORMER_WEIGHTS).read_bytes()).digest()
        with torch.no_grad():
            for parameter in checkpoint.load_transformer().parameters():
                parameter.zero_()
        assert hashlib.sha256((checkpoint.path / TRANSFORMER_WEIGHTS).read_bytes()).digest() == before

    def test_missing_unexpected_and_misshapen_weights_are_named_with_their_file(self, folder):
        weights = load_file(folder / TRANSFORMER_WEIGHTS)
        del weights["genre_embedder.bias"]
        weights["lyric_proj.weight"] = weights["lyric_proj.weight"][:3].clone()
        weights["transformer_blocks.0.attn.to_add_out.weight"] = torch.zeros(2)
        save_file(weights, folder / TRANSFORMER_WEIGHTS)
        with pytest.raises(InputError) as error:
            CheckpointDir.open(folder).load_transformer()
        message = str(error.value)
        assert "genre_embedder.bias is missing" in message
        assert "lyric_proj.weight in diffusion_pytorch_model.safetensors has shape (3, " in message
        assert "transformer_blocks.0.attn.to_add_out.weight" in message
        assert "3 more" not in message
        assert str(folder / "ace_step_transformer") in message

    def test_weights_in_shards_load_alike(self, folder, checkpoint):
        weights = load_file(folder / TRANSFORMER_WEIGHTS)
        names = sorted(weights)
        halves = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
        (folder / TRANSFORMER_WEIGHTS).unlink()
        for shard, held in halves.items():
            save_file({name: weights[name] for name in held}, folder / "ace_step_transformer" / shard)
        index = {"weight_map": {name: shard for shard, held in halves.items() for name in held}}
        index_path = folder / (TRANSFORMER_WEIGHTS + ".index.json")
        index_path.write_text(json.dumps(index))
        found = CheckpointDir.open(folder).load_transformer().state_dict()
        wanted = checkpoint.load_transformer().state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

        (folder / "ace_step_transformer/part-2.safetensors").unlink()
        with pytest.raises(InputError, match=r"missing weight files part-2\.safetensors"):
            CheckpointDir.open(folder)


class TestLyricVocab:
    def test_the_directorys_own_comes_first(self, checkpoint, monkeypatch):
        monkeypatch.setenv(LYRIC_VOCAB_VARIABLE, "/elsewhere.json")
        assert checkpoint.lyric_vocab_path() == checkpoint.path / "lyric_tokenizer/vocab.json"

    def test_the_variable_comes_second(self, folder, tmp_path, monkeypatch):
        (folder / "lyric_tokenizer/vocab.json").unlink()
        opened = CheckpointDir.open(folder)
        monkeypatch.setenv(LYRIC_VOCAB_VARIABLE, str(tmp_path / "vocab.json"))
        with pytest.raises(InputError, match=LYRIC_VOCAB_VARIABLE):
            opened.lyric_vocab_path()
        (tmp_path / "vocab.json").write_text("{}")
        assert opened.lyric_vocab_path() == tmp_path / "vocab.json"

    def test_neither_is_the_users_to_mend(self, folder, monkeypatch):
        monkeypatch.delenv(LYRIC_VOCAB_VARIABLE, raising=False)
        (folder / "lyric_tokenizer/vocab.json").unlink()
        with pytest.raises(InputError, match="checkpoint fetch"):
            CheckpointDir.open(folder).lyric_vocab_path()


class TestFingerprint:
    PARTS = (
        ("transformer", "ace_step_transformer/config.json"),
        ("transformer", TRANSFORMER_WEIGHTS),
        ("codec", "music_dcae_f8c8/diffusion_pytorch_model.safetensors"),
        ("vocoder", "music_vocoder/config.json"),
        ("text_encoder", "umt5-base/tokenizer.json"),
        ("mert", "mert/model.safetensors"),
        ("m-hubert", "mhubert/config.json"),
        ("lyric_vocab", "lyric_tokenizer/vocab.json"),
    )

    @pytest.mark.parametrize(("part", "file"), PARTS)
    def test_one_changed_byte_changes_the_fingerprint_of_its_part_alone(self, checkpoint, folder, part, file):
        copy = dataclasses.replace(checkpoint, path=folder)
        parts = {name for name, _ in self.PARTS}
        before = {name: copy.fingerprint(name) for name in parts}
        assert before == {name: checkpoint.fingerprint(name) for name in parts}
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)
        assert {name for name in parts if copy.fingerprint(name) != before[name]} == {part}

    def test_weights_are_not_read_again_by_a_later_process(self, folder, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(fingerprints, "NOTED_BYTES", 0)
        monkeypatch.setattr(fingerprints, "SETTLED_SECONDS", 0.0)
        copy = dataclasses.replace(checkpoint, path=folder)
        before = copy.fingerprint("transformer")
        monkeypatch.setattr(fingerprints, "_sha256_of", lambda *_: pytest.fail("it was read again"))
        assert copy.fingerprint("transformer") == before


class Hub(ThreadingHTTPServer):
    """Serves a checkpoint directory as the Hugging Face Hub does, with ranges, and notes every request for a file."""

    def __init__(self, files: dict[str, bytes], ssl_models: dict[str, list[str]]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.ssl_models = ssl_models
        self.requests: list[tuple[str, int]] = []
        self.cut_after: int | None = None
        """Bytes of a file after which the connection breaks."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.split("?")[0].lstrip("/")
        if path.startswith("api/models/"):
            self.send_listing(path.removeprefix("api/models/"))
        elif path in self.server.files:
            self.send_content(path, self.server.files[path])
        else:
            self.send_error(404)

    def send_listing(self, repository: str):
        siblings = []
        for name in self.server.ssl_models[repository]:
            content = self.server.files[f"{repository}/resolve/newest/{name}"]
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            siblings.append({"rfilename": name, **({} if name.endswith(".json") else {"lfs": lfs})})
        body = json.dumps({"id": repository, "sha": "newest", "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_content(self, path: str, content: bytes):
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.server.requests.append((path, start))
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.cut_after])

    def log_message(self, *args):
        pass


REPOSITORY = "ACE-Step/tiny"
SSL_REPOSITORIES = {"mert": "m-a-p/tiny", "mhubert": "utter-project/tiny"}
VOCAB = "vocab.json"


@pytest.fixture
def hub(checkpoint):
    """The tiny checkpoint on a server of its own."""
    files, ssl_models = {}, {}
    for path in checkpoint.path.rglob("*.*"):
        name = path.relative_to(checkpoint.path).as_posix()
        part, _, file = name.partition("/")
        if part in SSL_REPOSITORIES:
            files[f"{SSL_REPOSITORIES[part]}/resolve/newest/{file}"] = path.read_bytes()
            ssl_models.setdefault(SSL_REPOSITORIES[part], ["README.md"]).append(file)
        elif part == "lyric_tokenizer":
            files[VOCAB] = path.read_bytes()
        else:
            files[f"{REPOSITORY}/resolve/v1/{name}"] = path.read_bytes()
    for repository in ssl_models:
        files[f"{repository}/resolve/newest/README.md"] = b"not needed"
    server = Hub(files, ssl_models)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def release(hub) -> Release:
    prefix = f"{REPOSITORY}/resolve/v1/"
    return Release(
        repository=REPOSITORY,
        revision="v1",
        files={
            path.removeprefix(prefix): hashlib.sha256(content).hexdigest()
            for path, content in hub.files.items()
            if path.startswith(prefix)
        },
        lyric_vocab_url=f"{hub.url}/{VOCAB}",
        lyric_vocab_sha256=hashlib.sha256(hub.files[VOCAB]).hexdigest(),
        ssl_repositories=SSL_REPOSITORIES,
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*.*")}


class TestFetch:
    WEIGHTS = f"{REPOSITORY}/resolve/v1/{TRANSFORMER_WEIGHTS}"

    def test_every_part_arrives_and_nothing_else(self, hub, release, tmp_path, checkpoint):
        fetched = fetch_checkpoint(tmp_path / "new", release=release, endpoint=hub.url)
        assert contents(fetched.path) == contents(checkpoint.path)
        assert fetched.ssl_names == ("mert", "m-hubert")

    def test_what_is_right_already_is_not_downloaded_again(self, hub, release, tmp_path):
        fetch_checkpoint(tmp_path, release=release, endpoint=hub.url)
        (tmp_path / "umt5-base/tokenizer.json").unlink()
        (tmp_path / "music_vocoder/config.json").write_text("{}")
        hub.requests.clear()
        fetch_checkpoint(tmp_path, release=release, endpoint=hub.url)
        # The SSL models' configurations have no published sum.
        wanted = {"umt5-base/tokenizer.json", "music_vocoder/config.json", "resolve/newest/config.json"}
        assert len(hub.requests) == 4
        assert all(any(path.endswith(name) for name in wanted) for path, _ in hub.requests)

    def test_a_broken_download_goes_on_where_it_stopped(self, hub, release, tmp_path, checkpoint):
        hub.cut_after = 2_000_000
        with pytest.raises(AceStepError, match="it goes on where it stopped") as error:
            fetch_checkpoint(tmp_path, release=release, endpoint=hub.url)
        assert not isinstance(error.value, InputError)
        assert not (tmp_path / TRANSFORMER_WEIGHTS).exists()
        hub.cut_after = None
        hub.requests.clear()
        fetch_checkpoint(tmp_path, release=release, endpoint=hub.url)
        starts = dict(hub.requests)
        assert 0 < starts[self.WEIGHTS] <= 2_000_000
        assert contents(tmp_path) == contents(checkpoint.path)

    def test_a_whole_file_that_was_not_yet_renamed_is_used(self, hub, release, tmp_path):
        part = tmp_path / f"{TRANSFORMER_WEIGHTS}.part"
        part.parent.mkdir()
        part.write_bytes(hub.files[self.WEIGHTS])
        fetch_checkpoint(tmp_path, release=release, endpoint=hub.url)
        assert not part.exists()

    def test_a_file_with_another_sum_is_deleted_and_named(self, hub, release, tmp_path):
        hub.files[self.WEIGHTS] = hub.files[self.WEIGHTS][:-1] + b"?"
        with pytest.raises(AceStepError, match=r"SHA-256 .* deleted") as error:
            fetch_checkpoint(tmp_path, release=release, endpoint=hub.url)
        assert self.WEIGHTS in str(error.value)
        assert list((tmp_path / "ace_step_transformer").glob("diffusion*")) == []

    def test_an_ssl_model_is_held_against_the_hubs_own_sum(self, hub, release, tmp_path, monkeypatch):
        weights = f"{SSL_REPOSITORIES['mert']}/resolve/newest/model.safetensors"

        def send_other_bytes(handler, path, content, send=HubHandler.send_content):
            send(handler, path, b"?" + content[1:] if path == weights else content)

        monkeypatch.setattr(HubHandler, "send_content", send_other_bytes)
        with pytest.raises(AceStepError, match=f"{weights} came with SHA-256"):
            fetch_checkpoint(tmp_path, release=release, endpoint=hub.url)
        assert not (tmp_path / "mert/model.safetensors").exists()

    def test_a_missing_file_on_the_server_is_named(self, hub, release, tmp_path):
        del hub.files[VOCAB]
        with pytest.raises(AceStepError, match=rf"cannot download {hub.url}/{VOCAB}.*404"):
            fetch_checkpoint(tmp_path, release=release, endpoint=hub.url)

    def test_without_a_network_the_error_says_what_could_not_be_reached(self, hub, release, tmp_path):
        nowhere = "http://127.0.0.1:9"
        with pytest.raises(AceStepError, match=f"cannot download {nowhere}"):
            fetch_checkpoint(tmp_path, release=release, endpoint=nowhere)
        only_ssl = dataclasses.replace(release, files={})
        with pytest.raises(AceStepError, match="cannot list the files of m-a-p/tiny"):
            fetch_checkpoint(tmp_path, release=only_ssl, endpoint=nowhere)

    def test_the_released_sums_are_whole(self):
        assert len(ACE_STEP_V1.files) == 11
        for sha256 in [*ACE_STEP_V1.files.values(), ACE_STEP_V1.lyric_vocab_sha256]:
            assert len(bytes.fromhex(sha256)) == 32
