"""KV caches of fixed shape: a policy says which slot a token takes, a storage how a slot is held."""

from pallas_attn.caches.cache import CacheView as CacheView
from pallas_attn.caches.cache import KVCache as KVCache
from pallas_attn.caches.cache import init as init
from pallas_attn.caches.policies import Dense as Dense
from pallas_attn.caches.policies import Policy as Policy
from pallas_attn.caches.storage import Plain as Plain
from pallas_attn.caches.storage import Storage as Storage
