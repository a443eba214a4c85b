//! What a launch did, and the least time that a data sheet allows for it.

use crate::arch::Arch;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Work of one launch. "Warp instructions" count once per warp, whatever its active lanes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Counters {
    /// Instructions issued by warps.
    pub warp_instructions: u64,
    /// Sum of active lanes over them.
    pub lane_instructions: u64,
    /// Warp instructions by class: `integer`, `float`, `matrix`, ...
    pub by_class: BTreeMap<String, u64>,
    /// Matrix FLOPs (2 m n k), by operand type: `16-bit`, `tf32`, `f64`, `8-bit` (fp8), `int8`, `int4`, `1-bit`.
    pub matrix_flops: BTreeMap<String, u64>,
    /// f32 and f64 operations of lanes, an FMA being 2, a special function 1.
    pub float_flops: u64,
    /// Global-memory requests of warps.
    pub global_requests: u64,
    /// 32-byte sectors that these requests moved.
    pub global_sectors: u64,
    /// Sectors that their bytes would fill if packed.
    pub global_sectors_needed: u64,
    /// Bytes of distinct sectors read: the least DRAM reads.
    pub dram_bytes_read: u64,
    /// Bytes of distinct sectors written: the least DRAM writes.
    pub dram_bytes_written: u64,
    /// Shared-memory wavefronts: passes of up to 32 banks of 4 bytes.
    pub shared_wavefronts: u64,
    /// The least wavefronts for the same bytes.
    pub shared_wavefronts_least: u64,
    /// Bytes read and written in local memory.
    pub local_bytes: u64,
    /// Barriers, counted per warp.
    pub barriers: u64,
    /// Atomic warp instructions, `red` included.
    pub atomics: u64,
    /// PTX lines with bank conflicts, worst first.
    pub conflicts: Vec<LineConflict>,
}

/// Bank conflicts of one PTX line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LineConflict {
    /// PTX line.
    pub line: u32,
    /// The instruction.
    pub text: String,
    /// Wavefronts taken.
    pub wavefronts: u64,
    /// The least for the same bytes.
    pub least: u64,
}

/// The least time a data sheet allows for counted work. Never a measurement.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// The card whose data sheet is used.
    pub card: String,
    /// Lower bound of the time, microseconds.
    pub microseconds: f64,
    /// The limit that gives it.
    pub limited_by: String,
    /// All limits, microseconds.
    pub limits: BTreeMap<String, f64>,
    /// Where the rates come from.
    pub source: String,
}

/// What a successful launch did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LaunchReport {
    /// Kernel name.
    pub kernel: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Static plus dynamic shared memory of a block, bytes.
    pub shared_bytes: u32,
    /// Registers of a thread and whether the assembler gave them.
    pub registers: u32,
    /// True when `registers` came from the assembler's log.
    pub registers_from_assembler: bool,
    /// Resident blocks of one multiprocessor, and what limits them.
    pub occupancy_blocks: u32,
    /// `threads`, `registers`, `shared memory` or `blocks`.
    pub occupancy_limit: String,
    /// Resident warps over the most possible.
    pub occupancy: f64,
    /// The work.
    pub counters: Counters,
    /// Lower bound from the data sheet.
    pub estimate: Estimate,
}

impl Counters {
    /// Share of matrix instructions among all warp instructions, 0..=1.
    pub fn matrix_share(&self) -> f64 {
        ratio(self.by_class.get("matrix").copied().unwrap_or(0), self.warp_instructions)
    }

    /// Mean active lanes of a warp instruction.
    pub fn lanes_per_instruction(&self) -> f64 {
        ratio(self.lane_instructions, self.warp_instructions)
    }

    /// The least time `arch` allows for this work.
    pub fn estimate(&self, arch: &Arch) -> Estimate {
        let mut limits = BTreeMap::new();
        let matrix: f64 = self
            .matrix_flops
            .iter()
            .map(|(kind, &flops)| {
                // Where cards differ the higher rate counts: the result is a lower bound.
                let rate = match kind.as_str() {
                    "tf32" => arch.matrix_tf32_tflops,
                    "8-bit" => arch.matrix_8bit_tops,
                    "16-bit with 16-bit sums" => arch.matrix_f16_tflops * arch.half_sums,
                    "8-bit with 16-bit sums" => arch.matrix_8bit_tops * arch.half_sums,
                    "int8" => arch.matrix_int8_tops,
                    "int4" => 2.0 * arch.matrix_int8_tops,
                    "1-bit" => 8.0 * arch.matrix_int8_tops,
                    // The rate of f32 FMAs on A100 and H100, far less on the others.
                    "f64" => arch.fma_tflops,
                    _ => arch.matrix_f16_tflops,
                };
                flops as f64 / (rate * 1e6)
            })
            .sum();
        limits.insert("matrix rate".to_owned(), matrix);
        limits.insert("FMA rate".to_owned(), self.float_flops as f64 / (arch.fma_tflops * 1e6));
        // Four schedulers in each multiprocessor issue one warp instruction a clock.
        let issue = f64::from(arch.multiprocessors) * 4.0 * f64::from(arch.clock_khz) / 1e3;
        limits.insert("instruction issue".to_owned(), self.warp_instructions as f64 / issue);
        let wavefronts = f64::from(arch.multiprocessors) * f64::from(arch.clock_khz) / 1e3;
        limits.insert("shared memory".to_owned(), self.shared_wavefronts as f64 / wavefronts);
        let dram = (self.dram_bytes_read + self.dram_bytes_written) as f64;
        limits.insert("DRAM bandwidth".to_owned(), dram / (arch.dram_gbs * 1e3));
        if let Some(l2) = arch.l2_gbs {
            limits.insert("L2 bandwidth".to_owned(), self.global_sectors as f64 * 32.0 / (l2 * 1e3));
        }
        let (limited_by, microseconds) = limits
            .iter()
            .max_by(|a, b| a.1.total_cmp(b.1))
            .map_or((String::new(), 0.0), |(name, time)| (name.clone(), *time));
        Estimate { card: arch.card.into(), microseconds, limited_by, limits, source: arch.source.into() }
    }
}

impl LaunchReport {
    /// The report as a table for people.
    pub fn table(&self) -> String {
        let (c, mut out) = (&self.counters, String::new());
        let mut row = |name: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(out, "  {name:<28} {value}");
        };
        row("kernel", format!("{} grid {:?} block {:?}", self.kernel, self.grid, self.block));
        let from = if self.registers_from_assembler { "assembler" } else { "nominal" };
        row("registers", format!("{} ({from})", self.registers));
        row("shared bytes", self.shared_bytes.to_string());
        let occupancy = format!(
            "{:.0} % ({} blocks, limited by {})",
            100.0 * self.occupancy,
            self.occupancy_blocks,
            self.occupancy_limit
        );
        row("occupancy", occupancy);
        row("warp instructions", c.warp_instructions.to_string());
        row("lanes per instruction", format!("{:.2}", c.lanes_per_instruction()));
        for (class, n) in &c.by_class {
            row(&format!("  {class}"), format!("{n} ({:.1} %)", 100.0 * ratio(*n, c.warp_instructions)));
        }
        for (kind, flops) in &c.matrix_flops {
            row(&format!("matrix FLOPs {kind}"), flops.to_string());
        }
        row("float FLOPs", c.float_flops.to_string());
        row("global requests", c.global_requests.to_string());
        row("global sectors", format!("{} ({} needed)", c.global_sectors, c.global_sectors_needed));
        row("distinct bytes read", c.dram_bytes_read.to_string());
        row("distinct bytes written", c.dram_bytes_written.to_string());
        row("shared wavefronts", format!("{} ({} least)", c.shared_wavefronts, c.shared_wavefronts_least));
        for line in c.conflicts.iter().take(5) {
            row(&format!("  line {}", line.line), format!("{} ({} least) {}", line.wavefronts, line.least, line.text));
        }
        row("local bytes", c.local_bytes.to_string());
        row("barriers", c.barriers.to_string());
        row("atomics", c.atomics.to_string());
        let e = &self.estimate;
        row("estimate (lower bound)", format!("{:.3} us on {}, limited by {}", e.microseconds, e.card, e.limited_by));
        out
    }

    /// The report as JSON.
    pub fn json(&self) -> String {
        // Only numbers, strings and maps with string keys: serialising cannot fail.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}

fn ratio(a: u64, b: u64) -> f64 {
    if b == 0 { 0.0 } else { a as f64 / b as f64 }
}
