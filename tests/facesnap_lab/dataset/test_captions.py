"""Captions from text files, and from a tiny BLIP-2 with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.dataset.captions import MAX_TOKENS, load_blip2, read_caption
from facesnap_lab.training.shards import read_sample, read_shard_index
from tests.support.dataset_photos import portraits, save
from tests.support.training_world import tokenizer

SIDE = 28


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BLIP-2 model whose captions consist of random words that depend on the image."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("blip2")
    words = tokenizer(64)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "hidden_size": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    }
    ids = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.Blip2Config(
        vision_config={**size, "image_size": SIDE, "patch_size": 14},
        qformer_config={**size, "encoder_hidden_size": 32, "vocab_size": 20},
        text_config={"model_type": "opt", **text, **ids, "max_position_embeddings": 128},
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.Blip2ForConditionalGeneration(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    pixels = transformers.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    transformers.Blip2Processor(pixels, words, num_query_tokens=4).save_pretrained(folder)
    return folder


def greedy_caption(folder: Path, photo: np.ndarray) -> str:
    """Decode greedily, word by word, with explicit preprocessing using CLIP's means and standard deviations."""
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    small = np.asarray(Image.fromarray(photo).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255
    small = (small - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
    pixels = torch.from_numpy(small).float().permute(2, 0, 1)[None]
    token_ids = [model.config.image_token_index] * 4 + [model.config.text_config.bos_token_id]
    start = len(token_ids)
    while len(token_ids) < start + MAX_TOKENS and token_ids[-1] != model.config.text_config.eos_token_id:
        with torch.no_grad():
            token_ids.append(
                int(model(pixel_values=pixels, input_ids=torch.tensor([token_ids])).logits[0, -1].argmax())
            )
    return words.decode(token_ids[start:], skip_special_tokens=True).strip()


def test_blip2_decodes_greedily(blip2):
    photos = [np.asarray(portraits(index, 1)[0]) for index in range(4)]
    captions = load_blip2(blip2)(photos)
    assert captions == [greedy_caption(blip2, photo) for photo in photos]
    assert len(set(captions)) > 1


def test_blip2_captions_photos_without_a_caption_file(blip2, build_here, tmp_path):
    one, two = portraits(0, 2)
    save(one, tmp_path / "p" / "n0" / "0.png", "from the file")
    save(two, tmp_path / "p" / "n0" / "1.png").with_suffix(".txt").unlink()
    build_here(tmp_path / "p", blip2=blip2)
    index = read_shard_index(sorted((tmp_path / "out").glob("*.tar")))
    captions = {read_sample(index, i).caption for i in range(len(index))}
    assert captions == {"from the file", greedy_caption(blip2, np.asarray(two))}


def test_error_names_the_damaged_blip2_folder(blip2, tmp_path):
    (tmp_path / "config.json").write_text((blip2 / "config.json").read_text())
    with pytest.raises(FaceSnapError, match=r"BLIP-2 in .* cannot be loaded"):
        load_blip2(tmp_path)


def test_caption_is_read_as_one_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff  Ein Bild,\r\n  schön \n".encode())
    assert read_caption(path) == "Ein Bild, schön"


@pytest.mark.parametrize(("content", "message"), [(b" \n", "is empty"), (b"\xff\xfe\x41", "is not UTF-8")])
def test_empty_and_non_utf8_caption_files_are_rejected(content, message, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt {message}"):
        read_caption(path)
