//! What a simulated device checks, counts and permutes.

/// Which checks run. All are on by default.
///
/// Bounds and alignment are always checked, because a bad access must never reach the host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sanitizer {
    /// Reads of bytes that nobody wrote, in global, shared and local memory.
    pub uninitialised: bool,
    /// Races on shared memory: between warps, and between lanes of one warp.
    pub races_shared: bool,
    /// Races on global memory between blocks of one launch.
    pub races_global: bool,
    /// Accesses to the target of an asynchronous copy before its wait.
    pub async_copies: bool,
    /// `wgmma.fence`, and `fence.proxy.async` between writes of shared memory and asynchronous reads.
    pub fences: bool,
    /// Part of a warp skipping a barrier that the rest executes.
    pub barriers: bool,
}

impl Sanitizer {
    /// Every check.
    pub const ON: Sanitizer = Sanitizer {
        uninitialised: true,
        races_shared: true,
        races_global: true,
        async_copies: true,
        fences: true,
        barriers: true,
    };
    /// Only what keeps the simulator itself safe.
    pub const OFF: Sanitizer = Sanitizer {
        uninitialised: false,
        races_shared: false,
        races_global: false,
        async_copies: false,
        fences: false,
        barriers: false,
    };
}

/// How a [`crate::Device`] runs kernels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The checks.
    pub sanitizer: Sanitizer,
    /// Permutes the order of blocks and warps; `None` runs them in order.
    pub seed: Option<u64>,
    /// Warp instructions that one warp may execute in a launch before it counts as endless.
    pub budget: u64,
    /// Host threads that run blocks; 0 means one per core.
    pub threads: usize,
    /// Count sectors, wavefronts and touched bytes (instruction counts are always kept).
    pub counters: bool,
    /// Distinct reports kept of one launch.
    pub max_reports: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            sanitizer: Sanitizer::ON,
            seed: None,
            budget: 50_000_000,
            threads: 0,
            counters: false,
            max_reports: 16,
        }
    }
}
