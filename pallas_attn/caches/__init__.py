"""KV caches of fixed shape: a policy chooses the tokens to keep and their slots, a storage encodes the slots."""

from pallas_attn.caches.cache import CacheView as CacheView
from pallas_attn.caches.cache import KVCache as KVCache
from pallas_attn.caches.cache import Reservation as Reservation
from pallas_attn.caches.cache import init as init
from pallas_attn.caches.cache import nbytes as nbytes
from pallas_attn.caches.heavy_hitters import H2O as H2O
from pallas_attn.caches.heavy_hitters import QHitter as QHitter
from pallas_attn.caches.pages import Pages as Pages
from pallas_attn.caches.policies import Dense as Dense
from pallas_attn.caches.policies import Placement as Placement
from pallas_attn.caches.policies import Policy as Policy
from pallas_attn.caches.policies import Slots as Slots
from pallas_attn.caches.policies import State as State
from pallas_attn.caches.policies import Tokens as Tokens
from pallas_attn.caches.policies import Window as Window
from pallas_attn.caches.storage import Float8 as Float8
from pallas_attn.caches.storage import Int4 as Int4
from pallas_attn.caches.storage import Int8 as Int8
from pallas_attn.caches.storage import Paged as Paged
from pallas_attn.caches.storage import Plain as Plain
from pallas_attn.caches.storage import Storage as Storage
