//! Matrix work of the products on a CUDA device (`kernels/gemm.cuh` in bf16): how much of it the tensor cores are given, as
//! against what the windows need.
//!
//! A product works in chunks of 32 along its reduction, and in parts of 16 x 16 outputs that are left out where a window
//! misses them. So a window is rounded out, and the numbers here say by how much.

use crate::ops::tile::SPLIT_BF16;
use crate::routing::Window;

/// Chunk of a reduction.
const CHUNK: usize = 32;
/// Side of a part of the output.
const PART: usize = 16;

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
    /// Rows and columns of a tile, 64 or 128.
    pub side: usize,
}

fn parts(len: usize) -> usize {
    len.div_ceil(PART)
}

fn chunks(len: usize) -> usize {
    len.div_ceil(CHUNK)
}

/// Operations of `chunks` chunks for `parts` parts of the output.
fn of_parts(parts: usize, chunks: usize) -> u64 {
    2 * (parts * PART * PART) as u64 * (chunks * CHUNK) as u64
}

impl Batch<'_> {
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
        (0..rows).step_by(self.side).map(move |row| {
            let end = (row + self.side).min(rows);
            (end - row, self.union(row..end))
        })
    }

    /// Columns of parts in the tiles that `window` meets.
    fn parts_that_meet(&self, tile: usize, window: Window) -> usize {
        let end = (tile + self.side).min(self.channels);
        (tile..end).step_by(PART).filter(|&part| part < window.end() && part + PART > window.start).count()
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
            of_parts(parts(rows) * parts(outputs), chunks(window.end() - window.start / 8 * 8))
        });
        self.of(outputs, issued.sum())
    }

    /// `[B T, inputs] x [inputs, C]`, writing the windows: `linear_residual_fwd`, `ln_linear_bwd_input`.
    pub fn writes(&self, inputs: usize) -> Flops {
        let issued = self.row_tiles().flat_map(|(rows, window)| {
            let tiles = (0..self.channels).step_by(self.side);
            tiles.map(move |tile| of_parts(parts(rows) * self.parts_that_meet(tile, window), chunks(inputs)))
        });
        self.of(inputs, issued.sum())
    }

    /// `[C, B T] x [B T, other]`: gradients of weights, `ln_linear_bwd_weight` and `linear_residual_bwd_weight`.
    pub fn meets(&self, other: usize) -> Flops {
        let rows = self.rows();
        let issued = (0..rows).step_by(CHUNK).map(|row| {
            let window = self.union(row..(row + CHUNK).min(rows));
            let tiles = (0..self.channels).step_by(self.side).map(|tile| self.parts_that_meet(tile, window));
            of_parts(parts(other) * tiles.sum::<usize>(), 1)
        });
        self.of(other, issued.sum())
    }

    /// What the correction for inactive channels adds to `ln_linear_bwd_input` over `outputs`: P W and Q W.
    pub fn corrects_input(&self, outputs: usize) -> u64 {
        let rows = SPLIT_BF16 * 2 * self.windows.len();
        let parts_m: usize = (0..rows).step_by(self.side).map(|row| parts(self.side.min(rows - row))).sum();
        of_parts(parts_m * parts(self.channels), chunks(outputs))
    }

    /// What it adds to `ln_linear_bwd_weight`: P (x) (1 + scale) + Q (x) shift.
    pub fn corrects_weight(&self, outputs: usize) -> u64 {
        of_parts(parts(outputs) * parts(self.channels), SPLIT_BF16 * chunks(2 * self.windows.len()))
    }
}
