"""Write assets/blank: the shape of a tiny Qwen3 without weights, one token per character.

python assets/make_blank.py assets/blank
make sft && cp runs/sft/model/* assets/calculator/      # and the weights that are shipped
"""

import sys

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

characters = ["<pad>", "<bos>", "<eos>", *"0123456789+-*=[]#()/., x?"]
tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
tokenizer.decoder = decoders.Fuse()
fast = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token="<pad>",
    bos_token="<bos>",
    eos_token="<eos>",
    unk_token="?",
)
fast.save_pretrained(sys.argv[1])
Qwen3Config(
    architectures=["Qwen3ForCausalLM"],
    vocab_size=len(characters),
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
).save_pretrained(sys.argv[1])
