"""Plans of tensor parallelism for families of models: what :meth:`maptensors.Model.rank_view` takes.

The rules are those of Megatron: what makes features is split by output ("column", biases with it), what
takes them by input ("row", biases replicated, to be added once, after the sum over ranks). They go by the
names of the ``transformers`` library. Sizes must divide by the number of ranks. So must the numbers of
attention heads, key/value heads included, which weights do not tell: that is for the caller to see to.
"""

#: Llama, Mistral, Qwen2 and their like. Embeddings are split by vocabulary.
LLAMA: dict[str, str] = {
    "*.self_attn.[qkv]_proj.*": "column",
    "*.self_attn.o_proj.weight": "row",
    "*.self_attn.o_proj.bias": "replicate",
    "*.mlp.{gate,up}_proj.*": "column",
    "*.mlp.down_proj.weight": "row",
    "*.mlp.down_proj.bias": "replicate",
    "*embed_tokens.weight": "column",
    "lm_head.weight": "column",
    "*norm.weight": "replicate",
    "*.rotary_emb.inv_freq": "replicate",
}

#: BERT and its like. Embeddings and pooler are replicated: vocabularies of 30,522 divide by little.
BERT: dict[str, str] = {
    "*.attention.self.{query,key,value}.*": "column",
    "*.attention.output.dense.weight": "row",
    "*.intermediate.dense.*": "column",
    "*.layer.*.output.dense.weight": "row",
    "*.output.dense.bias": "replicate",
    "*LayerNorm.*": "replicate",
    "*embeddings.*": "replicate",
    "*pooler.dense.*": "replicate",
}
