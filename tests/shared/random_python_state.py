"""Idioms about state: what a call leaves behind and the next one finds. See the prelude."""

STATE = """
== counter_helper
@top
class Counter$:
    def __init__(self):
        self.k = 0
@init
self.counter$ = Counter$()
@forward
self.counter$.k += 1
x = P1(x) * self.counter$.k
== counter_namespace
@init
self.state$ = types.SimpleNamespace(k=0)
@forward
self.state$.k += 1
x = P1(x) * self.state$.k
== counter_attribute
@init
self.step$ = 0
@forward
self.step$ += 1
x = P1(x) * self.step$
== counter_every_other
@init
self.calls$ = 0
@forward
self.calls$ = self.calls$ + 1
x = P1(x) if self.calls$ % 2 else P2(x)
== counter_buffer
@init
self.register_buffer("steps$", torch.zeros(()))
@forward
self.steps$<<.add_(1)|| += 1>>
x = P1(x) * self.steps$
== counter_buffer_item
@init
self.register_buffer("ticks$", torch.zeros((), dtype=torch.long))
@forward
self.ticks$ += 1
x = P1(x) * self.ticks$.item()
== counter_class
@class
calls$ = 0
@forward
type(self).calls$ += 1
x = P1(x) * CLS.calls$
== counter_global
@top
CALLS$ = 0
@methods
def count$(self):
    global CALLS$
    CALLS$ += 1
    return CALLS$
@forward
x = P1(x) * self.count$()
== counter_global_dict
@top
STATS$ = {"n": 0, "sizes": []}
@forward
STATS$["n"] += 1
STATS$["sizes"].append(x.shape[0])
x = P1(x) * <<STATS$["n"]||len(STATS$["sizes"])||sum(STATS$["sizes"])>>
== counter_closure
@top
def counting$():
    n = 0
    def step():
        nonlocal n
        n += 1
        return n
    return step
@init
self.tick$ = counting$()
@forward
x = P1(x) * self.tick$()
== counter_iterator
@init
self.it$ = <<itertools.count(1)||iter(range(1, 100))||itertools.cycle([1, 2])>>
@forward
x = P1(x) * next(self.it$)
== counter_generator
@top
def numbers$():
    n = 1
    while True:
        yield n
        n += 1
GEN$ = numbers$()
@forward
x = P1(x) * next(GEN$)
== counter_collection
@init
self.seen$ = collections.Counter()
@forward
self.seen$[x.shape[0]] += 1
x = P1(x) * self.seen$[x.shape[0]]
== counter_property
@init
self._n$ = 0
@methods
@property
def n$(self):
    self._n$ += 1
    return self._n$
@forward
x = P1(x) * self.n$
== memory_last
@top
class Memory$:
    last = None
@init
self.mem$ = Memory$()
@forward
y$ = P1(x)
if self.mem$.last is not None and self.mem$.last.shape == y$.shape:
    y$ = y$ + self.mem$.last
self.mem$.last = y$.detach()
x = y$
== memory_attribute
@init
self.last$ = None
@forward
x = P1(x)
if self.last$ is not None:
    x = x + self.last$.mean()
self.last$ = x.detach()
== memory_lazy
if not hasattr(self, "first$"):
    self.first$ = x.detach().mean()
x = P1(x) + self.first$
== memory_average
@init
self.average$ = 0.0
@forward
x = P1(x)
self.average$ = 0.9 * self.average$ + 0.1 * x.detach().mean()
x = x - self.average$
== memory_average_number
@init
self.level$ = 1.0
@forward
self.level$ = 0.5 * self.level$ + 0.5
self.level$ += x.shape[0]
x = P1(x) * self.level$
== memory_buffer
@init
self.register_buffer("mean$", torch.zeros(1, 4, 1, 1))
@forward
self.mean$ = self.mean$ * 0.9 + x.detach().mean((0, 2, 3), keepdim=True) * 0.1
x = P1(x) - self.mean$
== memory_buffer_written
@init
self.register_buffer("bank$", torch.zeros(1, 4, 1, 1))
@forward
self.bank$.<<copy_(x.detach().mean((0, 2, 3), keepdim=True))||mul_(0.5).add_(1)||fill_(2)>>
x = P1(x) - self.bank$
== memory_queue
@init
self.queue$ = collections.deque(maxlen=2)
@forward
x = P1(x)
self.queue$.append(x.detach().mean())
x = x + sum(self.queue$) / len(self.queue$)
== memory_list
@init
self.history$ = []
@forward
self.history$.append(x.<<shape[0]||shape[-1]||detach().mean()>>)
x = P1(x) * len(self.history$) + self.history$[0]
== nested_containers
@init
self.cfg$ = {"a": [1, {"n": 0}], "b": (2, [])}
@forward
self.cfg$["a"][1]["n"] += 1
self.cfg$["b"][1].append(x.ndim)
x = P1(x) * self.cfg$["a"][1]["n"] + len(self.cfg$["b"][1])
== set_of_sizes
@init
self.sizes$ = set()
@forward
new$ = <<x.shape not in self.sizes$||tuple(x.shape[2:]) not in self.sizes$>>
self.sizes$.add(<<x.shape||tuple(x.shape[2:])>>)
x = P1(x) if new$ else P2(x)
== cache_by_size
@init
self.cache$ = {}
@forward
key$ = <<(x.shape[2], x.shape[3])||x.shape[2:]||str(x.shape)||f"{x.shape[2]}x{x.shape[3]}">>
if key$ not in self.cache$:
    self.cache$[key$] = torch.arange(x.shape[2] * x.shape[3], dtype=x.dtype).reshape(x.shape[2:])
x = P1(x) + self.cache$[key$]
== cache_of_last_size
@init
self.grid$, self.size$ = None, None
@forward
if self.size$ != tuple(x.shape[-2:]):
    self.size$ = tuple(x.shape[-2:])
    self.grid$ = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
x = P1(x) * self.grid$
== cache_lru
@top
@functools.lru_cache(maxsize=None)
def ramp$(n):
    return torch.arange(n) / n
@forward
x = P1(x) + ramp$(x.shape[-1])  # in float32
== cache_module_level
@top
RAMPS$ = {}
def ramp$(x):
    if x.shape[-1] not in RAMPS$:
        RAMPS$[x.shape[-1]] = torch.arange(x.shape[-1], dtype=x.dtype)
    return RAMPS$[x.shape[-1]]
@forward
x = P1(x) + ramp$(x)
== first_call
@init
self.ready$ = False
@forward
x = P1(x) if self.ready$ else P2(x) + 1
self.ready$ = True
== schedule
@init
self.todo$ = [3, 2, 1]
@forward
x = P1(x) * (self.todo$.pop() if self.todo$ else 0.5)
== global_switch
@top
FLAGS$ = {"scale": 2.0, "on": <<True||False>>}
@forward
x = P1(x) * FLAGS$["scale"] if FLAGS$["on"] else P2(x)
== hook_stores
@top
class Store$:
    def __init__(self, module):
        self.stored = None
        module.register_forward_hook(<<self.keep||lambda m, i, o: setattr(self, "stored", o)>>)
    def keep(self, module, inputs, output):
        self.stored = output
@init
self.store$ = Store$(L1)
@forward
y$ = L1(x).relu()
x = P2(y$) + self.store$.stored
== hook_appends
@top
SEEN$ = []
def keep$(module, inputs, output):
    SEEN$.append(output.detach().mean())
@init
L1.register_forward_hook(keep$)
@forward
x = L1(x)
x = x + <<SEEN$[-1]||SEEN$[0]||len(SEEN$)>>
== hook_changes
@top
def double$(module, inputs, output):
    return output * 2
@init
L1<<||[0]||[1]>>.register_forward_hook(double$)
@forward
x = P2(L1(x))
== hook_before
@init
L1<<||[1]>>.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
@forward
x = L1(x)
== hook_counts
@top
class Count$:
    n = 0
    def __call__(self, module, inputs, output):
        self.n += 1
        return output * self.n
@init
L1.register_forward_hook(Count$())
@forward
x = P2(L1(x))
== hook_on_itself
@init
self.register_forward_hook(<<CLS.after$||functools.partial(CLS.after$)>>)
@methods
@staticmethod
def after$(module, inputs, output):
    return output * 2 if isinstance(output, torch.Tensor) else output
@forward
x = P1(x)
"""
