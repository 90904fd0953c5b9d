"""Checks of the recipe that need neither the corpus nor training: python -m unittest"""
import random
import tempfile
import unittest
from pathlib import Path

import data
import gguf
import own_pairs
import tokenizer
import torch
import torch.nn.functional as F
from export import read_gguf, write_gguf
from model import Config, MoE, Qwen3Moe, from_hf_tensors, load_folder, save_folder

PAIRS = [("What is tar?", "Archiving utility."), ("Extract an archive (tar)", "tar xf <path/to/archive.tar>"),
         ("List all files, including hidden files (ls)", "ls -a"), ("Display help (az)", "az --help")] * 10


def small_tokenizer(folder):
    return tokenizer.train((text for pair in PAIRS for text in pair), 320, folder)


class Recipe(unittest.TestCase):
    def test_experts_equal_a_loop_over_tokens(self):
        torch.manual_seed(0)
        moe = MoE(Config(hidden_size=64, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32))
        for p in moe.parameters():
            torch.nn.init.normal_(p, 0, 0.2)
        x = torch.randn(1, 20, 64, dtype=torch.float32, requires_grad=True)
        got = moe(x)
        want = []
        for token in x[0]:
            weight, chosen = (moe.gate.weight @ token).softmax(-1).topk(3)
            out = 0
            for w, e in zip(weight / weight.sum(), chosen):
                gate, up = (token @ moe.gate_up[e]).chunk(2)
                out = out + w * ((F.silu(gate) * up) @ moe.down[e])
            want.append(out)
        want = torch.stack(want)[None]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # other order of f32 sums
        leaves = [x, moe.gate.weight, moe.gate_up, moe.down]
        for mine, theirs in zip(torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves)):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)

    def test_gguf_holds_the_model(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            small = small_tokenizer(folder)
            cfg = Config(vocab_size=small.get_vocab_size(), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
                         num_experts_per_tok=2, moe_intermediate_size=32)
            torch.manual_seed(0)
            save_folder(Qwen3Moe(cfg).state_dict(), cfg, folder)
            write_gguf(folder, folder / "m.gguf")
            tensors, read = read_gguf(folder / "m.gguf")
            self.assertEqual(read.to_hf() | {"rms_norm_eps": 1e-6}, cfg.to_hf())  # the file holds epsilon as f32
            again = Qwen3Moe(read).eval()
            again.load_state_dict(from_hf_tensors(tensors, read))
            first = load_folder(folder).eval()
            for (name, a), b in zip(first.named_parameters(), again.parameters()):
                exact = a.ndim == 1 or name.endswith("gate.weight")
                # Q8_0 rounds to 1/127 of the largest of 32 values, half a step, and its scale to f16: 127 steps / 2048
                torch.testing.assert_close(a, b, rtol=0, atol=0 if exact else float(a.detach().abs().max()) / 127 * 0.57)
            reader = gguf.GGUFReader(folder / "m.gguf")
            self.assertEqual(reader.fields["tokenizer.ggml.tokens"].contents(), [small.id_to_token(i) for i in range(cfg.vocab_size)])

    def test_a_tokenizer_that_splits_otherwise_is_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            small = small_tokenizer(folder)
            cfg = Config(vocab_size=small.get_vocab_size(), hidden_size=64, num_hidden_layers=1, num_experts=4, moe_intermediate_size=32)
            save_folder(Qwen3Moe(cfg).state_dict(), cfg, folder)
            text = (folder / "tokenizer.json").read_text()
            self.assertIn(r"\\p{N}|", text)
            (folder / "tokenizer.json").write_text(text.replace(r"\\p{N}|", r"\\p{N}{1,3}|"))
            with self.assertRaises(AssertionError):
                write_gguf(folder, folder / "m.gguf")

    def test_split_keeps_every_pair_on_one_side(self):
        pairs = [(f"q{i}", f"a{i}") for i in range(1000)]
        train, held = data.split(pairs)
        self.assertEqual((len(train), len(held)), (980, 20))
        self.assertEqual(sorted(train + held), sorted(pairs))
        self.assertEqual(data.split(pairs), (train, held))

    def test_rows_mark_exactly_the_answers(self):
        with tempfile.TemporaryDirectory() as folder:
            tok = small_tokenizer(Path(folder))
            ids, answers = data.Stream(PAIRS, tok, 96, seed=3).rows(20)
            for row, mask in zip(ids, answers):
                text = tok.decode(row.tolist(), skip_special_tokens=False)
                marked = tok.decode(row[1:][mask].tolist(), skip_special_tokens=False)
                want = "".join(part.split("<|im_start|>")[0] for part in text.split("<|im_start|>assistant\n")[1:])
                self.assertEqual(marked, want)

    def test_no_test_wording_is_trained_on(self):
        with tempfile.TemporaryDirectory() as folder:
            tok = small_tokenizer(Path(folder))
            stream = data.Stream(PAIRS, tok, 96, seed=4, own_share=1.0, chat_share=0.0)
            seen = tok.decode(stream.rows(400)[0].flatten().tolist(), skip_special_tokens=False).lower()
            for question, _ in own_pairs.TEST:
                self.assertNotIn(f"user\n{question.lower().strip('?!. ')}<", seen)

    def test_paraphrases_keep_the_tool_unless_it_is_common(self):
        rng = random.Random(5)
        for _ in range(300):
            text = data.paraphrase("Display help (az)", rng, keep=0.0)  # means nothing without its tool
            self.assertIn("az", text.lower())
        self.assertIn("How do I unpack an archive?", {data.paraphrase("Extract an archive (tar)", rng, keep=0.0) for _ in range(4000)})


if __name__ == "__main__":
    unittest.main()
