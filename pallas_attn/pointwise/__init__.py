"""User-written functions of one query and one key, in the form that kernels evaluate: programs and lookup tables."""

from pallas_attn.pointwise.program import Program as Program
from pallas_attn.pointwise.tables import Tables as Tables
from pallas_attn.pointwise.tables import floating as floating
from pallas_attn.pointwise.tables import is_floating as is_floating
from pallas_attn.pointwise.tables import map_arrays as map_arrays
from pallas_attn.pointwise.tables import map_operands as map_operands
from pallas_attn.pointwise.tables import map_tables as map_tables
from pallas_attn.pointwise.tables import operands as operands
from pallas_attn.pointwise.tables import table_arrays as table_arrays
from pallas_attn.pointwise.tables import where_live as where_live
from pallas_attn.pointwise.tables import with_floating as with_floating
from pallas_attn.pointwise.tracing import Trace as Trace
from pallas_attn.pointwise.tracing import check_number as check_number
from pallas_attn.pointwise.tracing import trace as trace
