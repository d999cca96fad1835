"""GPUs that XLA compiles for in their absence, as their data sheets and NVIDIA's tuning guides describe them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, in the terms of XLA's ``GpuTargetConfigProto``.

    Attributes:
      kind: the name by which JAX knows one of its compute capability.
      name: its own name.
      capability: its compute capability.
      multiprocessors: how many it has.
      lanes: float32 lanes of a multiprocessor.
      shared_bytes: shared memory of a multiprocessor; a program may use 1 KiB less.
      l2_bytes: second-level cache.
      memory_bytes, bandwidth: of its memory; bytes, and bytes per second.
      clock_ghz: boost clock.
    """

    kind: str
    name: str
    capability: float
    multiprocessors: int
    lanes: int
    shared_bytes: int
    l2_bytes: int
    memory_bytes: int
    bandwidth: int
    clock_ghz: float

    @property
    def description(self) -> str:
        """The text form of XLA's ``GpuTargetConfigProto``."""
        features = "ACCELERATED_FEATURES" if self.capability >= 9 else "NONE"
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_bytes}
              shared_memory_per_block_optin: {self.shared_bytes - 1024}
              threads_per_core_limit: 2048
              core_count: {self.multiprocessors}
              fpus_per_core: {self.lanes}
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              thread_dim_limit_x: 1024
              thread_dim_limit_y: 1024
              thread_dim_limit_z: 64
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2_bytes}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes}
              cuda_compute_capability {{ major: {int(self.capability)} feature_extension: {features} }}
              device_vendor: "NVIDIA Corporation"
              name: "{self.name}"
              driver_version: "13.0.0"
              runtime_version: "12.8.0"
              compile_time_toolkit_version: "12.8.0"
              dnn_version: "9.10.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            runtime_version {{ major: 12 minor: 8 patch: 0 }}
            device_description_str: "{self.name}"
        """


_H100 = Gpu(
    kind="NVIDIA H100",
    name="NVIDIA H100 80GB HBM3",
    capability=9.0,
    multiprocessors=132,
    lanes=128,
    shared_bytes=228 << 10,
    l2_bytes=50 << 20,
    memory_bytes=80 << 30,
    bandwidth=3_352_320_000_000,
    clock_ghz=1.98,
)
GPUS = {
    "A100": Gpu(
        kind="NVIDIA A100-SXM4-40GB",
        name="NVIDIA A100-SXM4-80GB",
        capability=8.0,
        multiprocessors=108,
        lanes=64,
        shared_bytes=164 << 10,
        l2_bytes=40 << 20,
        memory_bytes=80 << 30,
        bandwidth=2_039_040_000_000,
        clock_ghz=1.41,
    ),
    "H100": _H100,
    "H200": dataclasses.replace(_H100, name="NVIDIA H200", memory_bytes=141 << 30, bandwidth=4_800_000_000_000),
}
