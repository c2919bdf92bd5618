"""Idioms about arguments: optional ones, numbers and words, lists and dicts that are changed. See the prelude."""

ARGUMENTS = """
== optional_mask
@arg mask$=None ; x.sigmoid() ; x.tanh()
x = P1(x)
if mask$ is not None:
    x = x * mask$
== optional_state
@arg h$=None ; x.tanh()
x = P1(x) if h$ is None else P1(x) + P2(h$)
== optional_branch
@arg prompt$=None ; x ; x.sigmoid()
if prompt$ is None:
    x = P1(x)
else:
    x = P2(x) + prompt$
== optional_made_up
@arg weight$=None ; x.sigmoid()
if weight$ is None:
    weight$ = torch.ones_like(x)
x = P1(x) * weight$
== optional_two
@arg skip$=None ; x.relu()
@arg gate$=None ; x.sigmoid()
x = P1(x)
if skip$ is not None and gate$ is not None:
    x = x + skip$ * gate$
elif skip$ is not None or gate$ is not None:
    x = P2(x)
== number
@arg scale$=1.0 ; 2.0 ; 0.5 ; 1
x = P1(x)
if scale$ != 1.0:
    x = x * scale$
== repeated
@arg times$=1 ; 2 ; 3
for _ in range(times$):
    x = P1(x)
== word
@arg mode$="sum" ; "sum" ; "mean"
x = P1(x) + x if mode$ == "sum" else P1(x) * 0.5
== word_in_table
@arg act$="relu" ; "tanh" ; "relu"
x = {"relu": F.relu, "tanh": torch.tanh}[act$](P1(x))
== flag
@arg deep$=False ; True ; False
x = P1(x)
if deep$:
    x = P2(x)
== flag_or_tensor
@arg extra$=False ; x.relu()
x = P1(x)
if extra$ is not False:
    x = x + extra$
== more_tensors
@arg *more=() ; x.tanh() ; x.tanh(), x.relu()
x = P1(x)
for extra$ in more:
    x = x + extra$
== named_options
@arg **options={} ; gain=2.0 ; gain=0.5, deep=True
x = P1(x) * options.get("gain", 1.0)
if "deep" in options:
    x = P2(x)
== handed_on
@arg **options={} ; gain=2.0 ; deep=True
@methods
def scaled$(self, x, gain=1.0, deep=False):
    return P1(x) * gain if not deep else P2(x)
@forward
x = self.scaled$(x, **options)
== size
@arg size$=None ; (5, 5) ; (3, 4)
y$ = F.interpolate(x, size=size$ or x.shape[-2:])
x = P1(x) + P2(y$).mean((2, 3), keepdim=True)
== list_taken
@arg out$=None ; []
x = P1(x)
if out$ is not None:
    out$.append(x)
== list_overwritten
@arg feats$=None ; [x, x.relu()] ; [x]
if feats$ is not None:
    for i$ in range(len(feats$)):
        feats$[i$] = P1(feats$[i$])
    x = x + sum(feats$)
else:
    x = P1(x)
== dict_taken
@arg batch$=None ; {"mask": x.sigmoid()} ; {}
x = P1(x)
if batch$ and "mask" in batch$:
    x = x * batch$["mask"]
if batch$ is not None:
    batch$["seen"] = x
== default_list
@arg seen$=[] ; [1, 2]
seen$.append(1)
x = P1(x) * len(seen$)
== default_dict
@arg memo$={} ; {}
if "n" not in memo$:
    memo$["n"] = x.shape[0]
x = P1(x) * memo$["n"]
== written
@arg other$=None ; x ; x.clone()
x = P1(x)
if other$ is not None:
    other$.mul_(2)
    x = x + other$
== writes_its_input
x.<<mul_(2)||add_(1)||clamp_(-1.0, 1.0)>>
x = P1(x) + x
== one_of_two_written
@arg b$=None ; x ; x.relu()
y$ = P1(x)
if b$ is not None:
    b$.add_(1)
x = y$ + P2(x)
== class_of_argument
@arg scale$=None ; 2 ; 2.5 ; x.sigmoid() ; (2, 3)
x = P1(x)
if isinstance(scale$, (int, float)):
    x = x * scale$
elif isinstance(scale$, torch.Tensor):
    x = x + scale$
elif scale$ is not None:
    x = x * scale$[0] + scale$[1]
== cell_over_time
@top
class Cell$(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.h = conv_bn(4, 4), conv_bn(4, 4)
    def forward(self, x, h=None):
        return torch.tanh(self.i(x) if h is None else self.i(x) + self.h(h))
@init
self.cell$ = Cell$()
@forward
h$ = None
for t$ in range(x.shape[0]):
    h$ = self.cell$(x[t$:t$ + 1], h$)
x = P1(x) + h$
== list_popped
@top
class Decoder$(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = ConvBN(8, 4)
    def forward(self, x, skips):
        skip = skips.pop()
        if x.shape[-2:] != skip.shape[-2:]:
            x = F.interpolate(x, size=skip.shape[-2:])
        return self.c(torch.cat([x, skip], 1))
@init
self.decoder$ = Decoder$()
@forward
skips$ = [x, P1(x)]
x = self.decoder$(<<F.max_pool2d(x, 2)||x>>, skips$)
x = self.decoder$(x, skips$)
== list_appended
@top
class Head$(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = conv_bn(4, 4, 1)
    def forward(self, xs):
        xs.append(xs[0])
        <<||if xs[0].mean() > 1e9: return xs[0]||if len(xs) > 3: return xs[0]>>
        return torch.stack([self.c(x) for x in xs]).sum(0)
@init
self.head$ = Head$()
@forward
xs$ = [P1(x)]
x = self.head$(xs$) * len(xs$)
== list_detect
@top
class Detect$(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.ModuleList(conv_bn(4, 4, 1) for _ in range(2))
        self.grid = [torch.empty(0)] * 2
    def forward(self, x):
        for i in range(len(self.m)):
            x[i] = self.m[i](x[i])
            ny, nx = x[i].shape[2:]
            if self.grid[i].shape != (ny, nx):
                self.grid[i] = torch.arange(ny * nx, dtype=x[i].dtype).view(ny, nx)
            x[i] = x[i] + self.grid[i]
        return x
@init
self.detect$ = Detect$()
@forward
fs$ = [x, P1(x)]
self.detect$(fs$)
x = fs$[0] + fs$[1]
== dict_changed_by_part
@top
class Neck$(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = conv_bn(4, 4)
    def forward(self, feats):
        feats["p"] = self.c(feats.pop("c"))
        return feats
@init
self.neck$ = Neck$()
@forward
d$ = {"c": P1(x), "k": x}
self.neck$(d$)
x = d$["p"] + d$["k"] if "c" not in d$ else d$["c"]
== by_keyword
@methods
def both$(self, *, first, second):
    return P1(first) + P2(second)
@forward
x = self.both$(second=x, first=x.relu())
== star_shape
x = P1(x).reshape(*x.shape)
== default_of_a_method
@methods
def merge$(self, x, other=None, how=torch.add):
    return P1(x) if other is None else how(P1(x), other)
@forward
x = self.merge$(x<<||, x.relu()||, how=torch.mul||, x, torch.sub>>)
"""
