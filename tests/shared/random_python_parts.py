"""Idioms about parts: by which ways a forward gets at its layers, and what else it uses of them. See the prelude."""

PARTS = """
== plain
x = P1(x)
== residual
x = P1(x) + x
== activated
x = F.<<relu||silu||gelu||hardswish||leaky_relu>>(P1(x))
== branches
x = P1(x) + P2(x) + P3(x)
== concatenated
@init
self.fuse$ = conv_bn(8, 4, 1)
@forward
x = self.fuse$(torch.cat([P1(x), <<P2(x)||x>>], 1))
== named_layers
@init
self.conv$, self.bn$ = nn.Conv2d(4, 4, 3, padding=1, bias=<<True||False>>), nn.BatchNorm2d(4)
@forward
x = self.bn$(self.conv$(x))
== built_name
@init
self.block$_0, self.block$_1 = M1, M2
@forward
for i$ in range(2):
    x = getattr(self, f"block$_{i$}")(x)
== built_method
@class
mode$ = "first"
@methods
def run$_first(self, x):
    return <<getattr(L1, "0")||L1[0]||L1>>(x)
@forward
x = L1(x) + getattr(self, "run$_" + self.mode$)(x)
== guarded_use
@init
self.ready$ = False
@forward
y$ = getattr(L1, "0")(x) if self.ready$ else L1(x)
self.ready$ = True
x = P2(y$)
== cached_property
@methods
@functools.cached_property
def scale$(self):
    return L1[0].weight.abs().mean()
@forward
x = L1(x) * self.scale$
== plain_property
@methods
@property
def layers$(self):
    return [P1, P2]
@forward
for m$ in self.layers$:
    x = m$(x)
== property_number
@methods
@property
def channels$(self):
    return L1[0].out_channels
@forward
x = L1(x) / self.channels$
== partial
@init
self.call$ = functools.partial(P1)
@forward
x = <<self.call$(x)||functools.partial(P2)(x)||(lambda y: P1(y))(x)>>
== lambda_attribute
@init
self.call$ = lambda x: P1(x) * 2
@forward
x = self.call$(x)
== bound_method_kept
@init
self.run$ = P1<<.forward||.__call__>>
@forward
x = self.run$(x)
== other_method
@methods
def features$(self, x):
    return P1(x)
def head$(self, x):
    return P2(x)
@forward
x = self.head$(self.features$(x))
== own_forward
@top
class Own$(nn.Module):
    def __init__(self, deploy):
        super().__init__()
        self.a, self.b = conv_bn(4, 4), conv_bn(4, 4, 1)
        self.forward = self.forward_one if deploy else self.forward_two
    def forward_one(self, x):
        return self.a(x)
    def forward_two(self, x):
        return self.a(x) + self.b(x)
@init
self.own$ = Own$(<<True||False>>)
@forward
x = P1(self.own$(x))
== indexed_itself
@top
class Indexed$(nn.Sequential):
    def forward(self, x):
        return <<self[1](self[0](x))||self[-1](self[0](x))||super().forward(x)||self[1](self[0](x)) + x||
    x + len(self)>>
@init
self.seq$ = Indexed$(M1, M2)
@forward
x = self.seq$(x)
== walked
@init
self.model$ = <<nn.Sequential(M1, M2, M3)||nn.ModuleList([M1, M2, M3])>>
for i, m in enumerate(self.model$):
    m.f, m.i = <<-1||-1 if i < 2 else 0>>, i
@forward
ys$ = []
for m$ in self.model$:
    if m$.f != -1:
        x = ys$[m$.f]
    x = m$(x)
    ys$.append(x if m$.i in (0, 1) else None)
== walked_list
for m$ in <<[P1, P2]||(P1, P2)||reversed([P1, P2])||filter(None, [P1, None])>>:
    x = m$(x)
== module_list
@init
self.list$ = nn.ModuleList([M1, M2, M3])
@forward
<<for m$ in self.list$: x = m$(x)||for m$ in self.list$[1:]: x = x + m$(x)||x = sum(m(x) for m in self.list$)||
    x = torch.stack([m(x) for m in self.list$]).mean(0)||for i$, m$ in enumerate(self.list$): x = m$(x) * (i$ + 1)||
    x = functools.reduce(lambda y, m: m(y), self.list$, x)||x = sum(map(lambda m: m(x), self.list$))||
    x = self.list$[len(self.list$) - 1](x)||x = self.list$[-1](self.list$[0](x))||
    for m$, n$ in zip(self.list$, self.list$[1:]): x = n$(m$(x))>>
== module_dict
@init
self.dict$ = nn.ModuleDict({"a": M1, "b": M2})
@forward
<<for k$, m$ in self.dict$.items(): x = m$(x)||for k$ in self.dict$: x = self.dict$[k$](x)||
    x = self.dict$["a"](x) + self.dict$["b"](x)||for m$ in self.dict$.values(): x = m$(x)||
    x = self.dict$["a" if "c" not in self.dict$ else "b"](x)||x = {k: m(x) for k, m in self.dict$.items()}["b"]||
    for k$ in sorted(self.dict$, reverse=True): x = self.dict$[k$](x)>>
== modules_of_itself
@init
self.inner$ = nn.Sequential(M1, M2)
@forward
x = <<self._modules["inner$"](x)||self.get_submodule("inner$")(x)||next(self.inner$.children())(x)||
    dict(self.named_children())["inner$"](x)||self.inner$.forward(x)||self.inner$.__call__(x)||
    nn.Module.__call__(self.inner$, x)||dict(self.named_modules())["inner$.1"](x)||
    getattr(self.inner$, "1")(self.inner$[0](x))||vars(self)["_modules"]["inner$"](x)||list(self.inner$)[1](x)||
    self.inner$[:1](x)||operator_get$(self)(x)>>
@top
def operator_get$(module):
    return module.inner$
== plain_list_of_modules
@init
self.kept$ = [P1, P2]
@forward
for m$ in self.kept$:
    x = m$(x)
== registry
@top
REGISTRY$ = {}
@init
REGISTRY$["one"] = P1
@forward
x = P1(x) + REGISTRY$["one"](x)
== helper_holds
@top
class Runner$:
    def __init__(self, module):
        self.module = module
    def __call__(self, x):
        return self.module(x) * 2
@init
self.runner$ = Runner$(P1)
@forward
x = self.runner$(x) + P1(x)
== parent
@top
class Child$(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.c = conv_bn(4, 4)
        <<self.parent = [parent]||object.__setattr__(self, "owner", parent)||self.owner_ref = weakref.ref(parent)>>
    def forward(self, x):
        owner = getattr(self, "owner", None) or (self.parent[0] if hasattr(self, "parent") else self.owner_ref())
        return self.c(x) + owner.stem$(x)
@init
self.stem$ = conv_bn(4, 4)
self.child$ = Child$(self)
@forward
x = self.child$(self.stem$(x))
== shared
x = P1(P1(x))<<||+ P1(x.relu())>>
== tied
@init
self.tied$ = L1<<||[0]>>
@forward
x = L1(x) + self.tied$(x)
== layer_alone_too
x = L1(x) + L1[0](x)
== layer_by_hand
x = L1[1](<<F.relu(L1[0](x))||L1[0](x)||F.conv2d(x, L1[0].weight, L1[0].bias, padding=1)||
    F.conv2d(x, L1[0].weight, None, 1, 1)>>)
== norm_by_hand
n$ = L1[1]
x = F.batch_norm(L1[0](x), n$.running_mean, n$.running_var, n$.weight, n$.bias, False, 0.0, n$.eps)
== weight_read
x = L1(x) * <<L1[0].weight.mean()||L1[1].weight.view(1, -1, 1, 1)||L1[0].bias.sum()||next(L1.parameters()).std()||
    L1[1].running_mean.sum()||L1.state_dict()["0.weight"].sum()||sum(p.sum() for p in L1.parameters())||
    dict(L1.named_parameters())["1.bias"].sum()>>
== weight_changed
@init
self.register_buffer("gate$", torch.tensor([1.0, -2.0, 0.5, 1.0]).view(4, 1, 1, 1))
@forward
x = F.conv2d(x, L1[0].weight * self.gate$, L1[0].bias, padding=1)
x = L1[1](x)
== given_to_a_function
@top
def apply$(f, x, *args, times=1):
    for _ in range(times):
        x = f(x, *args)
    return x
@forward
x = apply$(P1, x<<||, times=2>>)
== built_in_forward
x = nn.Sequential(P1, <<nn.ReLU()||nn.Identity()||P2>>)(x)
== chosen_by_attribute
@init
self.deploy$, self.drop$ = <<True||False>>, <<None||nn.Dropout(0.5)||nn.Identity()>>
@forward
x = P1(x) if self.deploy$ else P1(x) + P2(x)
if self.drop$ is not None:
    x = self.drop$(x)
== optional_part
@init
self.down$ = <<None||conv_bn(4, 4, 1)>>
@forward
identity$ = x if self.down$ is None else self.down$(x)
x = F.relu(P1(x) + identity$)
== inherited
@top
class Base$(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv_bn(4, 4)
    def forward(self, x):
        return self.a(x)
class Derived$(Base$):
    def __init__(self):
        super().__init__()
        self.b = conv_bn(4, 4, 1)
    def forward(self, x):
        return self.b(<<super().forward(x)||Base$.forward(self, x)||super(Derived$, self).forward(x)>>)
@init
self.derived$ = Derived$()
@forward
x = P1(self.derived$(x))
== own_getattr
@top
class Wrapper$(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)
    def forward(self, x):
        return self.module(x)
@init
self.wrapped$ = Wrapper$(ConvBN(4, 4))
@forward
x = self.wrapped$(x)<<||+ self.wrapped$.conv(x)||* self.wrapped$.bn.num_features>>
== own_call
@top
class Timed$(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = conv_bn(4, 4)
    def __call__(self, x):
        return super().__call__(x) * 2
    def forward(self, x):
        return self.c(x)
@init
self.timed$ = Timed$()
@forward
x = P1(self.timed$(x))
== layer_subclass
@top
class Conv$(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * <<2||1||self.scale>>
    scale = 3
@init
self.conv$, self.bn$ = Conv$(4, 4, 3, padding=1), nn.BatchNorm2d(4)
@forward
x = self.bn$(self.conv$(x))
== wrapper_of_empty
@top
class Conv$(nn.Conv2d):
    def forward(self, x):
        if x.numel() == 0 and self.training:
            return x
        return super().forward(x)
@init
self.conv$, self.bn$ = Conv$(4, 4, 3, padding=1), nn.BatchNorm2d(4)
@forward
x = self.bn$(self.conv$(x))
== attribute_of_a_part
@init
self.s$ = M1
self.s$.stride, self.s$.names = 2, ["a", "b"]
@forward
x = self.s$(x) * self.s$.stride + len(self.s$.names)
== part_sets_flag
@init
self.log$ = []
@methods
def note$(self, x):
    self.log$.append(x.shape[-1])
    return x
@forward
x = self.note$(P1(x))
x = x * len(self.log$)
"""
