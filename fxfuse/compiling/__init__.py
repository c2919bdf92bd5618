"""Backend "fxfuse" of torch.compile: a graph of Dynamo's goes in, a callable that follows its weights comes out.

Never imports `whole_model`, `optimize` or `cli`; nothing below imports it, as torch._dynamo takes seconds to load.
"""
