//! Tiles of the products on a CUDA device (`kernels/gemm.cuh`).

use crate::backend::cuda::{Buffer, DType, Device};
use crate::error::{Error, Result};

/// Halves into which P and Q are split as operands of products in bf16 (`SPLIT` in `kernels/ln_linear_rows.cuh`).
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

/// Refuses buffers that are too short, or in bf16 start where 16 bytes cannot be read at a time: each with its name and the length
/// it must have, 0 for one that is left out.
pub(crate) fn check_buffers(operation: &'static str, elem: DType, buffers: &[(&str, Buffer, usize)]) -> Result<()> {
    for (name, buffer, len) in buffers {
        if buffer.len < *len {
            let what = format!("{name} has {} numbers, expected {len}", buffer.len);
            return Err(Error::Shape { operation, what });
        }
        // A sample's modulation may start anywhere, and rows of f32 that are no whole vectors are read one by one.
        let anywhere = ["shift", "scale", "gate", "dshift", "dscale", "dgate"].contains(name);
        if (elem == DType::Bf16 && !anywhere || buffer.dtype == DType::Bf16) && !buffer.address.is_multiple_of(16) {
            let what = format!("{name} starts at {:#x}, but kernels in bf16 read 16 bytes at a time", buffer.address);
            return Err(Error::Shape { operation, what });
        }
    }
    Ok(())
}

/// Refuses sizes that the bf16 products cannot read 16 bytes at a time, and those that do not fit 32 bits.
pub(crate) fn check_sizes(operation: &'static str, elem: DType, rows: usize, sizes: &[usize]) -> Result<()> {
    if elem == DType::Bf16
        && let Some(size) = sizes.iter().find(|size| !size.is_multiple_of(8))
    {
        let what = format!("{size} channels or outputs in bf16, where they must be multiples of 8: use f32");
        return Err(Error::Shape { operation, what });
    }
    if rows == 0 || sizes.contains(&0) {
        return Err(Error::Shape { operation, what: format!("{rows} rows of {sizes:?}: there is nothing to compute") });
    }
    let widest = sizes.iter().copied().max().unwrap_or(1);
    if rows > i32::MAX as usize / 2 || widest > 1 << 24 {
        return Err(Error::Shape { operation, what: format!("{rows} rows of {widest} are too many for one launch") });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_that_kernels_cannot_use_are_refused() {
        let at = |address, len, dtype| Buffer { address, len, dtype };
        let says = |buffer: Buffer, len| {
            check_buffers("product", buffer.dtype, &[("x", buffer, len)])
                .map_err(|e| e.to_string())
                .err()
                .unwrap_or_default()
        };
        assert_eq!(says(at(32, 5, DType::Bf16), 5), "");
        assert_eq!(says(at(36, 5, DType::F32), 5), "");
        assert_eq!(says(Buffer::none(DType::Bf16), 0), "");
        assert!(says(at(32, 4, DType::Bf16), 5).contains("x has 4 numbers, expected 5"));
        assert!(says(Buffer::none(DType::F32), 1).contains("x has 0 numbers, expected 1"));
        assert!(says(at(40, 5, DType::Bf16), 5).contains("x starts at 0x28"));
        let in_bf16 = |name| check_buffers("product", DType::Bf16, &[(name, at(36, 5, DType::F32), 5)]);
        assert!(in_bf16("gate").is_ok() && in_bf16("bias").is_err());
    }

    #[test]
    fn few_tiles_are_small_ones() {
        let device = Device::on_paper("A100", 80, 108);
        let side = |rows, columns| tiling(&device, rows, columns).side;
        assert_eq!([side(8192, 1152), side(512, 3456), side(512, 1152), side(1, 1)], [128, 128, 64, 64]);
    }
}
