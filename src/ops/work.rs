//! Matrix work of the products on a CUDA device (`kernels/gemm.cuh` in bf16): how much of it the tensor cores are given, as
//! against what the windows need.
//!
//! A product works in steps along its reduction, and in parts of the output that are left out where a window misses them. So a
//! window is rounded out, and the numbers here say by how much.

use crate::ops::tile::SPLIT_BF16;
pub use crate::ops::tile::{SQUARE, Tile, WGMMA};
use crate::routing::Window;

/// Floating-point operations of a product, 2 for a multiply-add.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flops {
    /// Without windows.
    pub dense: u64,
    /// Inside the windows.
    pub needed: u64,
    /// What the tensor cores are given.
    pub issued: u64,
}

/// The samples of a batch that a product runs over.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// `[B]`
    pub windows: &'a [Window],
    /// T
    pub tokens: usize,
    /// C: what the windows are windows of.
    pub channels: usize,
    /// The product's tile.
    pub tile: Tile,
}

impl Batch<'_> {
    fn parts(&self, len: usize) -> usize {
        len.div_ceil(self.tile.part)
    }

    /// Operations of a reduction over `len` numbers for `parts` parts of the output.
    fn of_parts(&self, parts: usize, len: usize) -> u64 {
        let Tile { part, step, .. } = self.tile;
        2 * (parts * part * part) as u64 * (len.div_ceil(step) * step) as u64
    }

    fn rows(&self) -> usize {
        self.windows.len() * self.tokens
    }

    /// The smallest window that holds those of the samples of `rows`.
    fn union(&self, rows: std::ops::Range<usize>) -> Window {
        let samples = rows.start / self.tokens..=(rows.end - 1) / self.tokens;
        self.windows[samples].iter().copied().reduce(Window::union).expect("a range of rows is not empty")
    }

    /// Tiles of rows: how many rows, and the window of their samples.
    fn row_tiles(&self) -> impl Iterator<Item = (usize, Window)> {
        let rows = self.rows();
        (0..rows).step_by(self.tile.m).map(move |row| {
            let end = (row + self.tile.m).min(rows);
            (end - row, self.union(row..end))
        })
    }

    /// Parts of the channels that `window` meets.
    fn parts_that_meet(&self, window: Window) -> usize {
        let part = self.tile.part;
        (0..self.channels).step_by(part).filter(|&at| at < window.end() && at + part > window.start).count()
    }

    fn of(&self, other: usize, issued: u64) -> Flops {
        let each = 2 * (self.tokens * other) as u64;
        let needed: usize = self.windows.iter().map(|w| w.width).sum();
        let dense = self.windows.len() * self.channels;
        Flops { dense: each * dense as u64, needed: each * needed as u64, issued }
    }

    /// `[B T, C] x [C, outputs]`, reading the windows: `ln_linear_fwd`, `linear_residual_bwd_input`.
    pub fn reads(&self, outputs: usize) -> Flops {
        let issued = self.row_tiles().map(|(rows, window)| {
            // Copies of 16 bytes start at multiples of 8 channels.
            self.of_parts(self.parts(rows) * self.parts(outputs), window.end() - window.start / 8 * 8)
        });
        self.of(outputs, issued.sum())
    }

    /// `[B T, inputs] x [inputs, C]`, writing the windows: `linear_residual_fwd`, `ln_linear_bwd_input`.
    pub fn writes(&self, inputs: usize) -> Flops {
        let issued = self
            .row_tiles()
            .map(|(rows, window)| self.of_parts(self.parts(rows) * self.parts_that_meet(window), inputs));
        self.of(inputs, issued.sum())
    }

    /// `[C, B T] x [B T, other]`: gradients of weights, `ln_linear_bwd_weight` and `linear_residual_bwd_weight`.
    pub fn meets(&self, other: usize) -> Flops {
        let rows = self.rows();
        let issued = (0..rows).step_by(self.tile.chunk).map(|row| {
            let end = (row + self.tile.chunk).min(rows);
            self.of_parts(self.parts(other) * self.parts_that_meet(self.union(row..end)), end - row)
        });
        self.of(other, issued.sum())
    }

    /// What the correction for inactive channels adds to `ln_linear_bwd_input` over `outputs`: P W and Q W.
    pub fn corrects_input(&self, outputs: usize) -> u64 {
        let rows = SPLIT_BF16 * 2 * self.windows.len();
        let parts_m: usize = (0..rows).step_by(self.tile.m).map(|row| self.parts(self.tile.m.min(rows - row))).sum();
        self.of_parts(parts_m * self.parts(self.channels), outputs)
    }

    /// What it adds to `ln_linear_bwd_weight`: P (x) (1 + scale) + Q (x) shift.
    pub fn corrects_weight(&self, outputs: usize) -> u64 {
        SPLIT_BF16 as u64 * self.of_parts(self.parts(outputs) * self.parts(self.channels), 2 * self.windows.len())
    }
}
