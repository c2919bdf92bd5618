"""Idioms about tensors: made in the forward, written, viewed, split, and modes switched on in it. See the prelude."""

TENSORS = """
== fresh_total
total$ = torch.zeros(<<1||()||1, 1>>)  # in float32
for i$ in range(4):
    total$ += x[:, i$].mean()
x = P1(x) * total$
== fresh_canvas
out$ = torch.zeros(4, 4, 8, 8, dtype=x.dtype)
out$[:x.shape[0], :, :x.shape[2], :x.shape[3]] = P1(x)
x = out$[:x.shape[0], :, :x.shape[2], :x.shape[3]]
== fresh_canvas_fixed
out$ = torch.zeros(1, 4, 9, 9)  # in float32
out$[:, :, 1:4, 1:4] = P1(x)[:1, :, :3, :3]
x = P2(x) + out$.mean()
@out out$
== fresh_canvas_sized
out$ = <<torch.zeros(x.shape[0], 4, *x.shape[2:], dtype=x.dtype)||torch.zeros_like(x)||x.new_zeros(x.shape)||
    torch.empty_like(x).fill_(1)||torch.full_like(x, 0.5)||torch.zeros(x.shape, dtype=x.dtype)||
    torch.ones(x.size()).to(x)>>
out$[:, <<:2||1::2||[0, 3]||0>>] = P1(x)[:, <<:2||1::2||[0, 3]||0>>]
x = out$ + P2(x)
== fresh_view
t$ = torch.zeros(4, 2)  # in float32
t$<<[:, 0]||.view(2, 4)||.t()[0]||.flatten()[1:3]||.unbind(1)[1]||.chunk(2)[0]||[0]>>.add_(x.mean())
x = P1(x) + t$.sum()
== fresh_constants
x = P1(x) + <<torch.arange(x.shape[-1])||torch.arange(x.shape[-1], dtype=x.dtype) / 7||
    torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)||torch.eye(x.shape[-1], dtype=x.dtype)[0]||
    torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype).view(4, 1, 1)||torch.ones(4, 1, 1, dtype=x.dtype).cumsum(0)||
    torch.full((1,), 2, dtype=x.dtype)||torch.tensor(x.shape[0])||torch.tensor(float(x.shape[-1]), dtype=x.dtype)||
    torch.ones(x.shape[2:], dtype=x.dtype).tril()||
    torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")[0]>>
== fresh_returned
g$ = <<torch.arange(5)||torch.zeros(3)||torch.ones(2, 2)||torch.eye(3)||torch.tensor([1, 2])||
    torch.zeros(x.shape[0])>>
x = P1(x)
@out g$
== fresh_written_later
g$ = <<torch.zeros(4, dtype=x.dtype)||torch.ones(4, dtype=x.dtype)||
    torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)>>
g$<<.add_(1)||.mul_(2)||[1] = 5||[:2] += 1||.scatter_(0, torch.tensor([1]), 3.0)||.copy_(x.mean((0, 2, 3)))||
    [0] = x.mean()||.index_fill_(0, torch.tensor([0, 2]), 7)>>
x = P1(x) * g$.view(4, 1, 1)
@out g$
== fresh_in_list
ts$ = [torch.zeros(4, 1, 1, dtype=x.dtype) for _ in range(2)]
for t$ in ts$:
    t$ += x.mean()
x = P1(x) + ts$[0] * ts$[1]
== fresh_by_index
i$ = torch.<<tensor([2, 0, 3, 1])||arange(3, -1, -1)||arange(4).flip(0)||
    randperm(4, generator=torch.Generator().manual_seed(1))>>
x = P1(x)<<[:, i$]||.index_select(1, i$)>>
== fresh_mask
m$ = torch.<<ones(x.shape[2], x.shape[3], dtype=torch.bool).tril()||arange(x.shape[3]) % 2 == 0>>
x = P1(x).masked_fill(<<m$||~m$>>, 0.5)
== fresh_onnx_shape
s$ = torch.tensor(x.shape)
x = P1(x) * s$<<[0]||[2:].prod()||.sum()||.tolist()[3]>>
== fresh_default_dtype
x = P1(x) + torch.<<zeros(1)||ones(1, dtype=torch.float64)||tensor(1.0)||tensor(1)||tensor([0.1])||
    ones(1, dtype=torch.float16)>>  # in float32
== written_after
y$ = P1(x)
y$<<.add_(1)||.relu_()||.mul_(x)||[:, 0] = 0||[:, 1] *= 2||.clamp_(-1, 1)||[..., :2] = x[..., :2]||
    .view(-1)[0] = 3||.transpose(1, 2)[:, 0].zero_()||.chunk(2, 1)[0].add_(1)||.zero_()||.copy_(x)||.sub_(y$.mean())>>
x = P2(y$)
== written_between
y$ = P1(x)
z$ = P2(y$)
y$ += 1
x = z$ + y$
@out y$
== written_view
y$ = P1(x)
v$ = y$<<[:, :2]||.view(x.shape[0], -1)||.flatten(1)||.permute(0, 2, 3, 1)||.detach()>>
v$.<<mul_(2)||add_(1)||relu_()>>
x = P2(y$)
@out v$
== written_by_function
y$ = P1(x)
torch.<<add(y$, 1, out=y$)||relu_(y$)||clamp_(y$, -1, 1)||mul(y$, x, out=torch.empty_like(y$))>>
x = P2(y$)
== added_in_place
y$ = P1(x)
y$ += P2(x)
y$ += x
x = F.relu_(y$)
== chunked
<<a$, b$||*_, a$, b$>> = <<P1(x).chunk(2, 1)||P1(x).split(2, 1)||P1(x).split([2, 2], dim=1)||
    torch.tensor_split(P1(x), 2, 1)>>
x = torch.cat([b$, a$.<<sigmoid()||relu()>>], 1)
@out a$
== chunk_loop
x = torch.cat([k$ * (i$ + 1) for i$, k$ in enumerate(P1(x).<<chunk(4, 1)||split(1, 1)||chunk(2, 1)||
    split(3, dim=1)>>)], 1)
== split_layers
@init
self.small$ = nn.ModuleList(conv_bn(2, 2) for _ in range(2))
@forward
x = torch.cat([m(k) for m, k in zip(self.small$, P1(x).chunk(2, 1))], 1)
== res2net
@init
self.small$ = nn.ModuleList(conv_bn(1, 1) for _ in range(3))
@forward
spx$, sp$ = torch.split(P1(x), 1, 1), 0
out$ = [spx$[3]]
for i$, conv$ in enumerate(self.small$):
    sp$ = spx$[i$] if i$ == 0 else sp$ + spx$[i$]
    sp$ = conv$(sp$)
    out$.append(sp$)
x = torch.cat(out$, 1)
== shuffled
b$, c$, h$, w$ = x.<<shape||size()>>
x = P1(x).view(b$, 2, c$ // 2, h$, w$).transpose(1, 2).<<reshape(b$, c$, h$, w$)||
    contiguous().view(b$, -1, h$, w$)||flatten(1, 2)>>
x = P2(x)
== attention
b$, c$, h$, w$ = x.shape
q$, k$ = P1(x).view(b$, c$, h$ * w$).split(<<[2, 2]||2>>, 1)
a$ = (q$.transpose(1, 2) @ k$ * <<2 ** -0.5||(h$ * w$) ** -0.5||q$.shape[1] ** -0.5>>).softmax(-1)
x = P2(x) + (x.flatten(2) @ a$).view(b$, c$, h$, w$)
== squeeze_excite
s$ = x.mean((2, 3), <<keepdim=True||True>>)
x = P1(x) * P2(s$).sigmoid()
== pooled
x = P1(x) + <<F.adaptive_avg_pool2d(x, 1)||F.adaptive_avg_pool2d(x, x.shape[-2:])||F.avg_pool2d(x, x.shape[-2:])||
    F.avg_pool2d(x, 3, 1, 1)||x.mean((2, 3), keepdim=True)||F.adaptive_max_pool2d(x, (1, 1))>>
== strided_view
x = P1(x).<<permute(0, 2, 3, 1).permute(0, 3, 1, 2)||transpose(2, 3).transpose(2, 3)||flip(-1)||
    contiguous(memory_format=torch.channels_last)||roll(1, 2)||unsqueeze(0).squeeze(0)||
    to(memory_format=torch.channels_last)>>
x = P2(x)
== batch_loop
x = torch.stack([P1(t.unsqueeze(0)).squeeze(0) for t in x])
x = <<P2(x)||torch.cat([t[None] for t in x.unbind(0)])>>
== patches
x = P1(x)
rows$ = [x[:, :, i:i + 2] * (i + 1) for i in range(0, x.shape[2], 2)]
x = torch.cat(rows$, 2)
== no_grad_inside
with torch.no_grad():
    y$ = P1(x)
x = P2(x) + y$
@out y$
== enable_grad_inside
with torch.enable_grad():
    y$ = P1(x)
x = P2(x) + y$
@out y$
== set_grad_inside
with torch.set_grad_enabled(<<self.training||False||True||torch.is_grad_enabled()>>):
    x = P1(x)
@out x
== no_grad_method
@methods
@torch.<<no_grad()||enable_grad()>>
def frozen$(self, x):
    return P1(x)
@forward
x = P2(self.frozen$(x))
== inference_inside
with torch.inference_mode():
    y$ = P1(x)
x = P2(x) + y$.clone()
== detached
y$ = P1(x)<<.detach()||.data||.clone()||.detach().clone()>>
x = P2(x) + y$
@out y$
== guidance
with torch.enable_grad():
    y$ = x.detach().requires_grad_()
    g$ = torch.autograd.grad(P1(y$).sum(), y$)[0]
x = P2(x) + g$
== autocast_off
with torch.autocast("cpu", enabled=False):
    x = P1(x)
== autocast_on
y$ = x
with torch.autocast("cpu", dtype=torch.bfloat16):
    z$ = P1(x)
@out z$
x = z$.<<to(y$)||type(y$.dtype)||to(y$.dtype)>>
== in_half
x = P1(x.<<to(torch.float32)||float()>>).to(x.dtype) if x.dtype is torch.float32 else P2(x)  # in float32
== to_another
x = P1(x).<<double().to(x.dtype)||to(x)||type_as(x)||to(x.device)||cpu()||to(dtype=x.dtype)||to("cpu", x.dtype)||
    to(P2(x).dtype)>>
== int_index
x = P1(x)
x = x + x[<<:, :1||..., :1||:1||:, [0]||:, -1:||0>>]<<||.mean()||.sum()>>
== aliases_returned
y$ = P1(x)
@out y$<<||[:, :2]||.view(-1)||.detach()||[0]>>
x = y$ if <<True||x.shape[0] > 1>> else P2(y$)
== input_returned
y$ = x
@out y$<<||.view(-1)||[:, :1]||.detach()||.contiguous()||.to(x.dtype)>>
x = P1(x)
== same_returned
y$ = P1(x)
@out [y$, y$, {"y": y$}]
x = P2(y$)
== dead_code
unused$ = P1(x) * 2
x = P2(x)
== einsum
x = <<torch.einsum("bchw,dc->bdhw", P1(x), L2[0].weight[:, :, 0, 0])||
    torch.einsum("bchw->bcwh", P1(x)).transpose(2, 3)||
    torch.matmul(P1(x), torch.ones(x.shape[-1], x.shape[-1], dtype=x.dtype))>>
== functional_weight
@init
self.weight$ = nn.Parameter(torch.randn(4, 4, 3, 3) * 0.2)
self.norm$ = nn.BatchNorm2d(4)
@forward
x = self.norm$(F.conv2d(x, self.weight$<<||* 2||- self.weight$.mean((2, 3), keepdim=True)||
    / self.weight$.norm()>>, padding=1))
== kernel_made
k$ = torch.zeros(4, 1, 3, 3, dtype=x.dtype)
<<k$[:, 0, 1, 1] = 1||for i in range(4): k$[i, 0, 1, 1] = i + 1||k$ += 0.1>>
x = L1[1](F.conv2d(x, k$, padding=1, groups=4))
"""
