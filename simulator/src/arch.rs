//! The GPUs that can be simulated: limits that decide which launches are refused, and data-sheet rates for estimates.

/// One GPU: the limits of its architecture and the figures of its data sheet.
///
/// Rates are the vendor's published peaks without sparsity; they feed the lower bound in
/// [`crate::counters::Estimate`], never a claimed time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arch {
    /// `sm_80`, `sm_86`, ...
    pub name: &'static str,
    /// The card whose data sheet the figures come from.
    pub card: &'static str,
    /// Compute capability, e.g. (8, 0).
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Resident threads of one multiprocessor.
    pub threads_per_sm: u32,
    /// Resident blocks of one multiprocessor.
    pub blocks_per_sm: u32,
    /// 32-bit registers of one multiprocessor, and the most that one block may use.
    pub registers_per_sm: u32,
    /// Shared memory of one multiprocessor, bytes.
    pub shared_per_sm: u32,
    /// Most shared memory of one block when the function opts in, bytes.
    pub shared_per_block_optin: u32,
    /// Shared memory that the system keeps for itself in each block, bytes.
    pub shared_reserved: u32,
    /// Second-level cache, bytes.
    pub l2_bytes: u32,
    /// Highest clock of the data sheet, kHz.
    pub clock_khz: u32,
    /// Memory clock, kHz, and bus width, bits.
    pub memory_clock_khz: u32,
    /// Memory bus width, bits.
    pub memory_bus_bits: u32,
    /// Device memory, bytes.
    pub memory_bytes: u64,
    /// DRAM bandwidth, GB/s.
    pub dram_gbs: f64,
    /// L2 bandwidth, GB/s, where a source gives one.
    pub l2_gbs: Option<f64>,
    /// f32 FMA rate, TFLOP/s.
    pub fma_tflops: f64,
    /// Matrix rate for f16/bf16 with f32 accumulation, TFLOP/s.
    pub matrix_f16_tflops: f64,
    /// How many times faster the matrix rates for f16 and fp8 are with f16 accumulation.
    pub half_sums: f64,
    /// Matrix rate for tf32, TFLOP/s.
    pub matrix_tf32_tflops: f64,
    /// Matrix rate for fp8 with f32 accumulation (where there is none, that of int8), TFLOP/s.
    pub matrix_8bit_tops: f64,
    /// Matrix rate for int8, TOP/s.
    pub matrix_int8_tops: f64,
    /// Where the figures come from.
    pub source: &'static str,
}

/// Threads of one warp.
pub const WARP: u32 = 32;
/// Most threads of one block, every architecture.
pub const MAX_THREADS_PER_BLOCK: u32 = 1024;
/// Most shared memory of a block without opting in, bytes.
pub const SHARED_DEFAULT: u32 = 48 * 1024;
/// Most registers of one thread.
pub const MAX_REGISTERS: u32 = 255;
/// Most blocks of a cluster that every GPU with clusters accepts.
pub const MAX_CLUSTER: u32 = 8;
/// Parts of a multiprocessor with registers of their own.
const QUARTERS: u32 = 4;
/// Most bytes of kernel parameters (PTX 8.1 and newer).
pub const MAX_PARAM_BYTES: u32 = 32_764;

/// Registers that a warp takes.
fn per_warp(registers: u32) -> u32 {
    (registers.max(1) * WARP).next_multiple_of(256)
}

impl Arch {
    /// A100 (SXM, 40 GB).
    pub const SM_80: Arch = Arch {
        name: "sm_80",
        card: "A100 SXM 40GB",
        capability: (8, 0),
        multiprocessors: 108,
        threads_per_sm: 2048,
        blocks_per_sm: 32,
        registers_per_sm: 65_536,
        shared_per_sm: 164 * 1024,
        shared_per_block_optin: 163 * 1024,
        shared_reserved: 1024,
        l2_bytes: 40 << 20,
        clock_khz: 1_410_000,
        memory_clock_khz: 1_215_000,
        memory_bus_bits: 5120,
        memory_bytes: 40 << 30,
        dram_gbs: 1555.0,
        l2_gbs: Some(7219.0),
        fma_tflops: 19.5,
        matrix_f16_tflops: 312.0,
        half_sums: 1.0,
        matrix_tf32_tflops: 156.0,
        matrix_8bit_tops: 624.0,
        matrix_int8_tops: 624.0,
        source: "NVIDIA A100 Tensor Core GPU Architecture (2020), comparison of data center GPUs; L2: 5120 bytes a clock, same paper",
    };
    /// GeForce RTX 3090.
    pub const SM_86: Arch = Arch {
        name: "sm_86",
        card: "GeForce RTX 3090",
        capability: (8, 6),
        multiprocessors: 82,
        threads_per_sm: 1536,
        blocks_per_sm: 16,
        registers_per_sm: 65_536,
        shared_per_sm: 100 * 1024,
        shared_per_block_optin: 99 * 1024,
        shared_reserved: 1024,
        l2_bytes: 6 << 20,
        clock_khz: 1_695_000,
        memory_clock_khz: 9_751_000,
        memory_bus_bits: 384,
        memory_bytes: 24 << 30,
        dram_gbs: 936.0,
        l2_gbs: None,
        fma_tflops: 35.6,
        matrix_f16_tflops: 71.0,
        half_sums: 2.0,
        matrix_tf32_tflops: 35.6,
        matrix_8bit_tops: 284.0,
        matrix_int8_tops: 284.0,
        source: "NVIDIA Ampere GA102 GPU Architecture V2.0, appendix A, GeForce RTX 3090",
    };
    /// GeForce RTX 4090.
    pub const SM_89: Arch = Arch {
        name: "sm_89",
        card: "GeForce RTX 4090",
        capability: (8, 9),
        multiprocessors: 128,
        threads_per_sm: 1536,
        blocks_per_sm: 24,
        registers_per_sm: 65_536,
        shared_per_sm: 100 * 1024,
        shared_per_block_optin: 99 * 1024,
        shared_reserved: 1024,
        l2_bytes: 72 << 20,
        clock_khz: 2_520_000,
        memory_clock_khz: 10_501_000,
        memory_bus_bits: 384,
        memory_bytes: 24 << 30,
        dram_gbs: 1008.0,
        l2_gbs: None,
        fma_tflops: 82.6,
        matrix_f16_tflops: 165.2,
        half_sums: 2.0,
        matrix_tf32_tflops: 82.6,
        matrix_8bit_tops: 330.3,
        matrix_int8_tops: 660.6,
        source: "NVIDIA Ada GPU Architecture (2022), appendix A, GeForce RTX 4090",
    };
    /// H100 (SXM, 80 GB).
    pub const SM_90: Arch = Arch {
        name: "sm_90",
        card: "H100 SXM 80GB",
        capability: (9, 0),
        multiprocessors: 132,
        threads_per_sm: 2048,
        blocks_per_sm: 32,
        registers_per_sm: 65_536,
        shared_per_sm: 228 * 1024,
        shared_per_block_optin: 227 * 1024,
        shared_reserved: 1024,
        l2_bytes: 50 << 20,
        clock_khz: 1_980_000,
        memory_clock_khz: 2_619_000,
        memory_bus_bits: 5120,
        memory_bytes: 80 << 30,
        dram_gbs: 3352.0,
        l2_gbs: None,
        fma_tflops: 66.9,
        matrix_f16_tflops: 989.4,
        half_sums: 1.0,
        matrix_tf32_tflops: 494.7,
        matrix_8bit_tops: 1978.9,
        matrix_int8_tops: 1978.9,
        source: "NVIDIA H100 Tensor Core GPU Architecture, final figures of the H100 SXM5; matrix rates are for 1830 MHz",
    };
    /// GeForce RTX 5090.
    pub const SM_120: Arch = Arch {
        name: "sm_120",
        card: "GeForce RTX 5090",
        capability: (12, 0),
        multiprocessors: 170,
        threads_per_sm: 1536,
        blocks_per_sm: 24,
        registers_per_sm: 65_536,
        shared_per_sm: 100 * 1024,
        shared_per_block_optin: 99 * 1024,
        shared_reserved: 1024,
        l2_bytes: 96 << 20,
        clock_khz: 2_407_000,
        memory_clock_khz: 14_001_000,
        memory_bus_bits: 512,
        memory_bytes: 32 << 30,
        dram_gbs: 1792.0,
        l2_gbs: None,
        fma_tflops: 104.8,
        matrix_f16_tflops: 209.5,
        half_sums: 2.0,
        matrix_tf32_tflops: 104.8,
        matrix_8bit_tops: 419.0,
        matrix_int8_tops: 838.0,
        source: "NVIDIA RTX Blackwell GPU Architecture (2025), appendix A, GeForce RTX 5090",
    };
    /// Every architecture that can be simulated.
    pub const ALL: [Arch; 5] = [Arch::SM_80, Arch::SM_86, Arch::SM_89, Arch::SM_90, Arch::SM_120];

    /// The architecture called `name`: `sm_80`, and also `sm_90a` or `compute_80`.
    pub fn by_name(name: &str) -> Option<Arch> {
        let digits = name.strip_prefix("sm_").or_else(|| name.strip_prefix("compute_")).unwrap_or(name);
        let digits = digits.trim_end_matches(['a', 'f']);
        Arch::ALL.into_iter().find(|a| &a.name[3..] == digits)
    }

    /// Compute capability as one number: 80, 86, 120.
    pub fn number(&self) -> u32 {
        self.capability.0 * 10 + self.capability.1
    }

    /// Whether a block of `threads` with `registers` each fits the registers of a multiprocessor. A GPU's check counts
    /// as if all four quarters of the multiprocessor had as many warps as the fullest one.
    pub fn registers_fit(&self, threads: u32, registers: u32) -> bool {
        let warps = threads.div_ceil(WARP).next_multiple_of(QUARTERS);
        registers <= MAX_REGISTERS && per_warp(registers) * warps <= self.registers_per_sm
    }

    /// Blocks of one multiprocessor that `threads`, `registers` per thread and `shared` bytes per block allow, and
    /// what limits them. Each quarter of the multiprocessor hands out its registers to its own warps, in units of 256 per
    /// warp; shared memory comes in units of 128 bytes.
    pub fn occupancy(&self, threads: u32, registers: u32, shared: u32) -> (u32, &'static str) {
        let warps = threads.div_ceil(WARP).max(1);
        let by_registers = match self.registers_fit(threads, registers) {
            true => self.registers_per_sm / QUARTERS / per_warp(registers) * QUARTERS / warps,
            false => 0,
        };
        let shared = u64::from(shared).div_ceil(128) * 128 + u64::from(self.shared_reserved);
        [
            (self.blocks_per_sm, "blocks"),
            (self.threads_per_sm / (warps * WARP), "threads"),
            (by_registers, "registers"),
            ((u64::from(self.shared_per_sm) / shared) as u32, "shared memory"),
        ]
        .into_iter()
        .min_by_key(|(blocks, _)| *blocks)
        .unwrap_or((0, "blocks"))
    }
}
