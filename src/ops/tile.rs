//! Tiles of the products on a CUDA device (`kernels/gemm.cuh`).

use crate::backend::cuda::{DType, Device};
use crate::error::{Error, Result};

/// Halves into which P and Q are split as operands of products in bf16 (`SPLIT` in `kernels/ln_linear.cu`).
pub(crate) const SPLIT_BF16: usize = 2;

/// Threads of a block of a product.
pub(crate) const THREADS: u32 = 128;

/// Definitions for kernels that have no product: those of the small tile, so that a file is not compiled once more.
pub(crate) const SMALL: [(&str, i64); 2] = [("TILE_M", 64), ("TILE_N", 64)];

/// The tile of a product, and its grid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiling {
    /// Definitions of the kernel.
    pub(crate) defines: [(&'static str, i64); 2],
    /// Rows and columns of a tile.
    pub(crate) side: usize,
    /// Tiles along the columns, tiles along the rows.
    pub(crate) grid: [u32; 3],
}

/// Side of a large and of a small tile, and what a multiply-add costs in them: a small tile loads more for each.
const SIDES: [(usize, usize); 2] = [(128, 2), (64, 3)];

/// A product of `rows` x `columns`: the tiles that keep the busiest multiprocessor for the least time.
pub(crate) fn tiling(device: &Device, rows: usize, columns: usize) -> Tiling {
    let tiles = |side: usize| [columns.div_ceil(side), rows.div_ceil(side)];
    let time = |&(side, cost): &(usize, usize)| {
        tiles(side).iter().product::<usize>().div_ceil(device.multiprocessors() as usize) * side * side * cost
    };
    let (side, _) = SIDES.into_iter().min_by_key(time).expect("there are two");
    let [x, y] = tiles(side);
    Tiling { side, defines: [("TILE_M", side as i64), ("TILE_N", side as i64)], grid: [x as u32, y as u32, 1] }
}

/// Refuses sizes that the bf16 products cannot read 16 bytes at a time, and those that do not fit 32 bits.
pub(crate) fn check_sizes(operation: &'static str, elem: DType, rows: usize, sizes: &[usize]) -> Result<()> {
    if elem == DType::Bf16
        && let Some(size) = sizes.iter().find(|size| !size.is_multiple_of(8))
    {
        let what = format!("{size} channels or outputs in bf16, where they must be multiples of 8: use f32");
        return Err(Error::Shape { operation, what });
    }
    let widest = sizes.iter().copied().max().unwrap_or(1);
    if rows > i32::MAX as usize / 2 || widest > 1 << 24 {
        return Err(Error::Shape { operation, what: format!("{rows} rows of {widest} are too many for one launch") });
    }
    Ok(())
}
