"""Idioms that ask: about tensors, numbers, sizes, modes, and act on the answer. See the prelude."""

QUESTIONS = """
== class_of_a_tensor
x = P1(x) * (2 if <<torch.is_tensor(x)||type(x) is torch.Tensor||isinstance(x, torch.Tensor)||
    type(x) == torch.Tensor||x.__class__ is torch.Tensor||type(x).__name__ == "Tensor"||
    issubclass(type(x), torch.Tensor)||not isinstance(x, (list, tuple))||callable(x)>> else 3)
== dtype
x = P1(x) * (2 if <<x.dtype is torch.float32||x.dtype == torch.float32||x.dtype in {torch.float32}||
    x.dtype in (torch.float64,)||x.is_floating_point()||x.dtype.is_floating_point||"float32" in str(x.dtype)||
    {torch.float32: True}.get(x.dtype, False)||torch.finfo(x.dtype).bits == 32||x.element_size() == 4||
    x.dtype == self.ones$.dtype>> else 3)
@init
self.register_buffer("ones$", torch.ones(1))
== device
x = P1(x) * (2 if <<"cpu" in str(x.device)||x.is_cuda||x.device.type == "cpu"||x.device == torch.device("cpu")||
    f"{x.device}" == "cpu"||x.device in {torch.device("cpu")}>> else 3)
== layout
x = P1(x) * (2 if <<x.is_contiguous()||x.stride(1) == 42||x.requires_grad||x.is_leaf||x.layout is torch.strided||
    x.grad_fn is None||x.is_contiguous(memory_format=torch.channels_last)||x.storage_offset() == 0||
    x.is_inference()||x._version == 0>> else 3)
== rank
x = P1(x) * (2 if <<x.ndim == 4||x.dim() == 4||len(x.shape) == 4||{4: True}.get(x.ndim, False)||x.ndim in {3, 4}||
    len(x.size()) > 3||x.ndim - 4>> else 3)
== size_known
@init
self.tab$ = {(6, 7): 2.0, (5, 8): 3.0}
@forward
x = P1(x) * (2 if <<(x.shape[2], x.shape[3]) in self.tab$||tuple(x.shape[2:]) in self.tab$||
    x.shape[2:] in self.tab$||x.shape[-1] in {7, 9}||x.size(2) in (6,)||x.shape[-1] in range(8)>> else 3)
== size_table
@init
self.tab$ = {7: 2.0, 8: 3.0}
@forward
x = P1(x) * <<self.tab$.get(x.shape[-1], 1.0)||{6: 0.5}.get(x.shape[2], 2)||
    (self.tab$[x.shape[-1]] if x.shape[-1] in self.tab$ else 1)>>
== size_compared
x = P1(x) if <<x.shape[-1] % 2||x.shape[-1] > 7||x.shape[2] == x.shape[3]||x.shape[0] == 1||
    x.shape[2] < x.shape[3]||x.numel() > 300||len(x) > 1||max(x.shape[2:]) > 7||x.size()[2] != 6||
    not x.shape[-1] % 2||x.shape[2:] == (6, 7)||torch.Size([6, 7]) == x.shape[2:]||list(x.shape[2:]) == [6, 7]||
    min(x.shape) > 1||all(s > 1 for s in x.shape)||any(s == 7 for s in x.shape)||x.shape.numel() > 300||
    sorted(x.shape)[0] > 1||x.shape.count(4) > 1>> else P2(x)
== size_shapes_agree
y$ = P1(x)
x = y$ + x if <<y$.shape == x.shape||y$.size(1) == x.size(1)||y$.shape[1:] == x.shape[1:]||
    y$.shape[-2:] == x.shape[-2:]||y$.ndim == x.ndim>> else y$
== size_padded
n$ = <<x.shape[-1] % 2||-x.shape[-1] % 4||(4 - x.shape[-1] % 4) % 4||max(8 - x.shape[-1], 0)>>
if n$<<|| > 0||!= 0>>:
    x = F.pad(x, (0, n$))
x = P1(x)
if n$:
    x = x[..., :-n$]
== size_asserted
<<assert x.shape[1] == 4, f"four channels, not {x.shape[1]}"||assert x.dim() == 4||assert x.shape[-1] > 2||
    torch._assert(x.shape[1] == 4, "channels")||assert isinstance(x, torch.Tensor)>>
x = P1(x)
== size_is_a_number
x = P1(x) * <<float(x.shape[-1])||int(x.shape[0])||math.sqrt(x.shape[-1])||x.shape[-1] ** -0.5||
    (2 if isinstance(x.shape[0], int) else 3)||(2 if type(x.shape[0]) is int else 3)||round(x.shape[-1] / 2)||
    divmod(x.shape[-1], 3)[0]||x.shape[-1] // 2||bin(x.shape[-1]).count("1")||len(str(x.numel()))||
    math.ceil(x.shape[-1] / 4)||torch.tensor(x.shape[-1], dtype=x.dtype)||math.prod(x.shape[2:])||sum(x.shape)||
    abs(x.shape[0] - x.shape[1])||hash(x.shape[-1])||min(x.shape[-1], 7)>>
== size_in_text
@init
self.scale_7 = 2.0
self.modes$ = nn.ModuleDict({"m4": M1, "m5": M2})
@forward
x = <<x * getattr(self, f"scale_{x.shape[-1]}", 1.0)||(x if hasattr(self, f"scale_{x.shape[-1]}") else -x)||
    self.modes$[f"m{x.ndim}"](x)||(x if f"{x.shape[-1]}" == "7" else x * 2)||x * ("%d" % x.shape[-1]).count("7")||
    x * "{}".format(tuple(x.shape)).count("6")||x * int(str(x.shape[-1]))>>
x = self.modes$["m5"](x)
== text_of_a_tensor
x = P1(x) * (2 if <<str(x).startswith("tensor")||"tensor" in repr(x)||f"{x}"[0] == "t"||
    len(f"{x.shape}") > 5>> else 3)
== size_loop
for i$ in range(<<x.shape[0]||x.size(1)||len(x)||x.shape[-1] // 3||x.ndim>>):
    x = <<x * 0.9 + i$||P1(x)>>
x = P2(x)
== size_unpacked
b$, c$, h$, w$ = <<x.shape||x.size()||map(int, x.shape)||[int(s) for s in x.shape]>>
x = P1(x).view(b$, c$, h$ * w$).<<view(b$, c$, h$, w$)||reshape(x.shape)||unflatten(2, (h$, w$))||view_as(x)>>
== size_kept
y$ = P1(x)
x = F.interpolate(F.max_pool2d(y$, 2), size=<<x.shape[-2:]||tuple(x.shape[2:])||(x.shape[2], x.shape[3])||
    [int(s) for s in x.shape[2:]]>>)
== data_branch
x = P1(x) if x<<.sum() > 0||.mean() < 1e9||.max() > 3||[0, 0, 0, 0] > 0||.abs().sum().item() > 400||.isnan().any()||
    .eq(0).all()||.sum() < 1e9 and x.shape[0]>> else P2(x)
== data_early
x = P1(x)
if x<<.sum() > 1e9||.isinf().any()||.numel() == 0>>:
    return x
x = P2(x)
== data_loop
n$ = 0
while x.abs().<<max() > 1.5||mean() > 0.6>> and n$ < 3:
    x, n$ = x * 0.7, n$ + 1
x = P1(x) + n$
== data_where
x = torch.where(x > 0, P1(x), P2(x))
== data_number
x = P1(x) * <<float(x.sum() > 0)||x.argmax().item()||int(x.max() > 0)||len(x.nonzero()) / 100||x.sum().sign().item()>>
== data_chosen
@init
self.experts$ = nn.ModuleList([M1, M2])
@forward
x = self.experts$[int(x.<<mean() > 0||sum() > 1e9||flatten()[0] > 0>>)](x)
== parameter_asked
@init
self.alpha$ = nn.Parameter(torch.tensor(<<0.0||0.5||1.0>>))
@forward
x = P1(x)
if self.alpha$<<|| > 0||!= 0||.item()||.abs() > 0.1>>:
    x = x * (1 + self.alpha$)
== buffer_item
@init
self.register_buffer("gain$", torch.tensor(<<2.0||0.5||3>>))
@forward
x = P1(x) * <<self.gain$.item()||float(self.gain$)||(2 if self.gain$ > 1 else 3)||int(self.gain$)||
    self.gain$.tolist()>>
== alpha_plain
@init
self.alpha$ = <<0||0.5||None||1.0||""||"a">>
@forward
x = P1(x)
if self.alpha$:
    x = P2(x)
== training
x = P1(x) * (2 if <<self.training||torch.jit.is_scripting()||torch.jit.is_tracing()||
    torch.onnx.is_in_onnx_export()||self.training and torch.is_grad_enabled()>> else 3)
== grad_mode_asked
x = P1(x) * (2 if <<torch.is_grad_enabled()||torch.is_inference_mode_enabled()||torch.is_autocast_enabled("cpu")||
    torch.get_default_dtype() is torch.float32||not torch.is_grad_enabled()>> else 3)
== attributes_of_a_tensor
x = P1(x.tensors if hasattr(x, "tensors") else x)
x = x * (2 if <<hasattr(x, "shape")||hasattr(x, "mask$")||getattr(x, "extra$", None) is None||
    hasattr(x, "__len__")||getattr(x, "ndim", 0) == 4||isinstance(getattr(x, "name$", ""), str)>> else 3)
== class_of_input
@init
self.kind$ = 1
@forward
if isinstance(x, <<dict||collections.abc.Mapping>>):
    x = x["img"]
if isinstance(x, <<(list, tuple)||list>>):
    x = torch.cat(x, 1)
x = P1(x)
== matched
match <<x.ndim||x.shape[-1]||x.shape[0]||type(self).__name__>>:
    case 4 | 7:
        x = P1(x)
    case _:
        x = P2(x)
== matched_class
match <<x||(x, 1)||[x]||{"x": x}>>:
    case torch.Tensor():
        x = P1(x)
    case (torch.Tensor(), 1):
        x = P1(x) * 2
    case [torch.Tensor() as y$]:
        x = P2(y$)
    case {"x": y$}:
        x = P2(y$) * 2
== matched_shape
match <<tuple(x.shape)||list(x.shape)||x.shape>>:
    case (1, _, h$, w$):
        x = P1(x) * h$
    case (_, 4, _, 7):
        x = P1(x) * 2
    case _:
        x = P2(x)
== identity
y$ = <<x||x.contiguous()||x.to(x.dtype)||x.float()||x.relu()||x.expand(-1, -1, -1, -1)||self.id$(x)>>
x = P1(x) * (2 if <<y$ is x||y$ is not x||id(y$) == id(x)>> else 3)
@init
self.id$ = nn.Identity()
== looked_up_by_tensor
table$ = {x: 2.0}
x = P1(x) * table$<<[x]||.get(x, 1.0)||.get(x + 0, 3.0)>>
== in_a_list
xs$ = [x, x.relu()]
x = P1(x) * (2 if <<any(t is x for t in xs$)||len(set(xs$)) == 2||len({t.shape for t in xs$}) == 1||
    len({x: 0, xs$[1]: 1}) == 2>> else 3)
== tried
try:
    x = P1(x)<<.view(2, -1, *x.shape[1:])||[3]||.reshape(2, 2, 2)||.squeeze(0).unflatten(0, (2, 2))>>.mean() + x
except (RuntimeError, IndexError, ValueError):
    x = P2(x)
== tried_missing
try:
    x = self.missing$(x)
except AttributeError:
    x = P1(x)
== rare_questions
x = P1(x) * (2 if <<x.is_meta||x.is_sparse||x.is_quantized||torch.is_complex(x)||x.is_complex()||
    torch.overrides.has_torch_function((x,))||torch.overrides.is_tensor_like(x)||torch.numel(x) % 2>> else 3)
== sizes_of_weights
x = P1(x) * <<L2[0].weight.shape[0]||L2[0].out_channels||L2[0].weight.numel()||L2[1].weight.ndim||
    L2[1].num_features||L2[0].weight.size(-1)||len(list(L2.parameters()))||L2[0].kernel_size[0]||
    sum(p.numel() for p in self.parameters())||len(list(self.modules()))||L2[1].eps>>
x = L2(x)
"""
