//! Matrix work of the products on a CUDA device (`kernels/gemm.cuh` in bf16): how much of it the tensor cores are given, as
//! against what the windows need.
//!
//! A product works in chunks along its reduction, and in tiles or parts of tiles. So a window is rounded out, and the numbers here
//! say by how much.

use crate::ops::cuda::tile::SPLIT_BF16;
pub use crate::ops::cuda::tile::{Kind, SQUARE, Tile, WGMMA};
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

/// Side of a part that [`Kind::Mma`] may leave out, and columns that [`Kind::Wgmma`] cuts a tile by.
const PART: usize = 16;
const CUT: usize = 64;

impl Batch<'_> {
    /// Operations for `area` outputs over a reduction of `len`.
    fn over(&self, area: usize, len: usize) -> u64 {
        2 * area as u64 * len.next_multiple_of(self.tile.chunk) as u64
    }

    /// Rows that are computed for `rows` of a tile, or of many tiles.
    fn whole_rows(&self, rows: usize) -> usize {
        rows.next_multiple_of(if self.tile.kind == Kind::Mma { PART } else { self.tile.m })
    }

    /// Columns that are computed for `columns` outside of windows.
    fn whole_columns(&self, columns: usize) -> usize {
        columns.next_multiple_of(if self.tile.kind == Kind::Mma { PART } else { self.tile.n })
    }

    /// Of the tiles of `columns`, as many columns as are computed for a window of them.
    fn cut_columns(&self, columns: usize, window: Window) -> usize {
        if self.tile.kind == Kind::Mma {
            return PART * self.parts_that_meet(columns, window);
        }
        let of_tile = |first: usize| {
            let end = (first + self.tile.n).min(window.end());
            let start = first.max(window.start / self.tile.align * self.tile.align);
            if first >= window.end() || first + self.tile.n <= window.start {
                0
            } else {
                (end - start).next_multiple_of(CUT)
            }
        };
        (0..columns).step_by(self.tile.n).map(of_tile).sum()
    }

    /// Of `channels` in tiles of `side`, as many as are computed for a window that changes on the way.
    fn met_channels(&self, window: Window, side: usize) -> usize {
        if self.tile.kind == Kind::Mma {
            return PART * self.parts_that_meet(self.channels, window);
        }
        let meets = |&first: &usize| first < window.end() && (first + side).min(self.channels) > window.start;
        side * (0..self.channels).step_by(side).filter(meets).count()
    }

    fn parts_that_meet(&self, channels: usize, window: Window) -> usize {
        (0..channels).step_by(PART).filter(|&at| at < window.end() && at + PART > window.start).count()
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

    fn of(&self, other: usize, issued: u64) -> Flops {
        let each = 2 * (self.tokens * other) as u64;
        let needed: usize = self.windows.iter().map(|w| w.width).sum();
        let dense = self.windows.len() * self.channels;
        Flops { dense: each * dense as u64, needed: each * needed as u64, issued }
    }

    /// `[B T, C] x [C, outputs]`, reading the windows: `ln_linear_fwd`, `linear_residual_bwd_input`.
    pub fn reads(&self, outputs: usize) -> Flops {
        let issued = self.row_tiles().map(|(rows, window)| {
            let start = window.start / self.tile.align * self.tile.align;
            self.over(self.whole_rows(rows) * self.whole_columns(outputs), window.end() - start)
        });
        self.of(outputs, issued.sum())
    }

    /// `[B T, inputs] x [inputs, C]`, writing the windows: `linear_residual_fwd`, `ln_linear_bwd_input`.
    pub fn writes(&self, inputs: usize) -> Flops {
        let issued = self
            .row_tiles()
            .map(|(rows, window)| self.over(self.whole_rows(rows) * self.cut_columns(self.channels, window), inputs));
        self.of(inputs, issued.sum())
    }

    /// `[other, B T] x [B T, C]`, windows of its columns: `ln_linear_bwd_weight`.
    pub fn meets_columns(&self, other: usize) -> Flops {
        self.meets(other, self.tile.n, self.whole_rows(other))
    }

    /// `[C, B T] x [B T, other]`, windows of its rows: `linear_residual_bwd_weight`.
    pub fn meets_rows(&self, other: usize) -> Flops {
        self.meets(other, self.tile.m, self.whole_columns(other))
    }

    fn meets(&self, other: usize, side: usize, computed: usize) -> Flops {
        let rows = self.rows();
        let issued = (0..rows).step_by(self.tile.chunk).map(|row| {
            let end = (row + self.tile.chunk).min(rows);
            self.over(computed * self.met_channels(self.union(row..end), side), end - row)
        });
        self.of(other, issued.sum())
    }

    /// What the correction for inactive channels adds to `ln_linear_bwd_input` over `outputs`: P W and Q W.
    pub fn corrects_input(&self, outputs: usize) -> u64 {
        let rows = SPLIT_BF16 * 2 * self.windows.len();
        self.over(self.whole_rows(rows) * self.cut_columns(self.channels, Window::all(self.channels)), outputs)
    }

    /// What it adds to `ln_linear_bwd_weight`: P (x) (1 + scale) + Q (x) shift.
    pub fn corrects_weight(&self, outputs: usize) -> u64 {
        let area = self.whole_rows(outputs) * self.whole_columns(self.channels);
        SPLIT_BF16 as u64 * self.over(area, 2 * self.windows.len())
    }
}
