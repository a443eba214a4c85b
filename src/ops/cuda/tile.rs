//! Tiles of the products on a CUDA device (`kernels/gemm.cuh`).

use crate::backend::cuda::launch::Matrix;
use crate::backend::cuda::{Arg, Buffer, DType, Device, Launch};
use crate::error::{Error, Result};

/// Halves into which P and Q are split as operands of products in bf16 (`SPLIT` in `kernels/ln_linear_rows.cuh`).
pub(crate) const SPLIT_BF16: usize = 2;

/// Definitions for kernels that have no product: those of the small tile, so that a file is not compiled once more.
pub(crate) const SMALL: [(&str, i64); 2] = [("TILE_M", 64), ("TILE_N", 64)];

/// Instructions that a product is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `mma.sync`, or FMA in f32: leaves out parts of 16 rows and columns that no window meets.
    Mma,
    /// `wgmma`: whole tiles; of one that a window of columns cuts, as many columns as reach from its first to its last, in 64s.
    Wgmma,
}

/// A tile of a product (`kernels/gemm_steps.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// What multiplies.
    pub kind: Kind,
    /// Rows.
    pub m: usize,
    /// Columns.
    pub n: usize,
    /// Chunk of the reduction.
    pub chunk: usize,
    /// Channels that a window's first one is rounded down to a multiple of.
    pub align: usize,
    /// What a multiply-add costs, as against the other tiles: a small one loads more for each.
    cost: usize,
    threads: u32,
    shared: u32,
}

/// Chunks of a block, on average, that make one more worth while where there are no more tiles than blocks.
const SHARE: usize = 16;

impl Tile {
    /// Blocks that a multiprocessor has at once.
    fn resident(&self) -> usize {
        match (self.kind, self.m) {
            (Kind::Wgmma, _) => 1,
            (Kind::Mma, 128) => 2,
            (Kind::Mma, _) => 4,
        }
    }
}

const fn square(side: usize, cost: usize) -> Tile {
    let (chunk, stages) = (32, 3);
    let shared = stages * 2 * side * chunk * 2;
    Tile { kind: Kind::Mma, m: side, n: side, chunk, align: 8, cost, threads: 128, shared: shared as u32 }
}

const fn wide(m: usize, n: usize, cost: usize) -> Tile {
    let chunk = 64;
    let stage = (m + n) * chunk * 2;
    // As many stages as a multiprocessor's shared memory holds.
    let shared = (227 << 10) / (stage + 8) * (stage + 8);
    Tile { kind: Kind::Wgmma, m, n, chunk, align: 16, cost, threads: 2 * m as u32, shared: shared as u32 }
}

/// The tiles of [`Kind::Mma`].
pub const SQUARE: [Tile; 2] = [square(128, 4), square(64, 6)];
/// Those of bf16 on sm_90. The last is for weights' gradients of which no window names rows: it would skip the fewest.
/// (Two blocks of 128 x 128 on a multiprocessor were slower than one block in every product, on an H100.)
pub const WGMMA: [Tile; 4] = [wide(128, 256, 12), wide(128, 192, 14), wide(128, 128, 16), wide(192, 256, 10)];

/// Those of kernels whose blocks go over many tiles, and finish one while the next is multiplied: there is room for its sums.
pub(crate) const OVERLAPPED: [Tile; 2] = [overlapped(192, 14), overlapped(128, 16)];

const fn overlapped(n: usize, cost: usize) -> Tile {
    let tile = wide(128, n, cost);
    let (sums, stage) = (tile.m * (n + 8) * 4, (tile.m + n) * tile.chunk * 2);
    let shared = sums + ((227 << 10) - sums) / (stage + 8) * (stage + 8);
    Tile { threads: 512, shared: shared as u32, ..tile }
}

/// The tile of a product, and its grid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiling {
    /// The tile.
    pub(crate) tile: Tile,
    /// Definitions of the kernel.
    pub(crate) defines: [(&'static str, i64); 2],
    /// Tiles along the columns, tiles along the rows; or how many blocks go over them.
    pub(crate) grid: [u32; 3],
}

impl Tiling {
    /// An operand `[rows, columns]` of the product, for its tensor copies.
    pub(crate) fn operand(&self, buffer: Buffer, rows: usize, columns: usize) -> Arg {
        let is_copied = self.tile.kind == Kind::Wgmma && !buffer.is_none();
        Arg::Map(is_copied.then_some(Matrix { buffer, rows, columns }))
    }

    /// The launch of a product.
    pub(crate) fn launch(&self, file: &'static str, kernel: &'static str, elem: DType) -> Launch<'_> {
        let Tile { threads: block, shared, .. } = self.tile;
        Launch { file, kernel, elem, defines: &self.defines, grid: self.grid, block, shared }
    }
}

/// A product of `rows` x `columns`: the tiles that keep the busiest multiprocessor for the least time.
pub(crate) fn tiling(device: &Device, elem: DType, rows: usize, columns: usize) -> Tiling {
    best(device, if has_wgmma(device, elem) { &WGMMA[..3] } else { &SQUARE }, rows, columns)
}

/// That of a kernel whose blocks go over many tiles.
pub(crate) fn overlapped_tiling(device: &Device, elem: DType, rows: usize, columns: usize) -> Tiling {
    if !has_wgmma(device, elem) {
        return tiling(device, elem, rows, columns);
    }
    let tiling = best(device, &OVERLAPPED, rows, columns);
    let blocks = device.multiprocessors().min(tiling.grid.iter().product());
    Tiling { grid: [blocks, 1, 1], ..tiling }
}

/// A weight's gradient `[rows, columns]`, whose reduction is over `inner` rows: the tiles, and how many blocks compute them. More than
/// tiles, if those would leave a quarter of the device idle: then their reductions are cut ([`crate::ops::cuda::shares`]). On an
/// H100 that costs more than is planned for, so tiles for which most blocks find work are left whole.
pub(crate) fn gradient_tiling(
    device: &Device,
    elem: DType,
    [rows, columns]: [usize; 2],
    inner: usize,
    windows_of_rows: bool,
) -> Tiling {
    let has_wgmma = has_wgmma(device, elem);
    let tiles = match (has_wgmma, windows_of_rows) {
        (false, _) => &SQUARE[..],
        // A tall tile would skip fewer rows.
        (true, true) => &WGMMA[..3],
        (true, false) => &WGMMA,
    };
    let tiling = best(device, tiles, rows, columns);
    let count = tiling.grid.iter().product::<u32>() as usize;
    let at_once = device.multiprocessors() as usize * tiling.tile.resident();
    let blocks = match 4 * count <= 3 * at_once {
        true => at_once.min(count.max(count * inner.div_ceil(tiling.tile.chunk) / SHARE)),
        false => count,
    };
    Tiling { grid: [blocks as u32, 1, 1], ..tiling }
}

fn has_wgmma(device: &Device, elem: DType) -> bool {
    device.arch() == 90 && elem == DType::Bf16
}

fn best(device: &Device, tiles: &[Tile], rows: usize, columns: usize) -> Tiling {
    let counts = |tile: &Tile| [columns.div_ceil(tile.n), rows.div_ceil(tile.m)];
    let time = |tile: &&Tile| {
        let all: usize = counts(tile).iter().product();
        all.div_ceil(device.multiprocessors() as usize) * tile.m * tile.n * tile.cost
    };
    let tile = *tiles.iter().min_by_key(time).expect("there are some");
    let [x, y] = counts(&tile).map(|count| count as u32);
    Tiling { tile, defines: defines(&tile), grid: [x, y, 1] }
}

fn defines(tile: &Tile) -> [(&'static str, i64); 2] {
    [("TILE_M", tile.m as i64), ("TILE_N", tile.n as i64)]
}

/// Where a buffer of f32 must start. (One of bf16 always at a multiple of 16 bytes, one of integers if activations are bf16.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Starts {
    /// At a multiple of 16 bytes.
    Aligned,
    /// There if activations are bf16, anywhere if they are f32.
    AlignedInBf16,
    /// Anywhere: kernels read vectors only where they can.
    Anywhere,
}

/// A buffer that an operation is given, and what it must be.
pub(crate) struct Operand {
    /// In messages only.
    name: &'static str,
    buffer: Buffer,
    /// The fewest numbers it may have, 0 for one that is left out.
    len: usize,
    starts: Starts,
}

impl Operand {
    /// One that kernels read or write 16 bytes at a time.
    pub(crate) fn new(name: &'static str, buffer: Buffer, len: usize) -> Self {
        Operand { name, buffer, len, starts: Starts::Aligned }
    }

    /// A weight or a bias, or its gradient: they lie one after the other, whatever their lengths.
    pub(crate) fn weight(name: &'static str, buffer: Buffer, len: usize) -> Self {
        Operand { name, buffer, len, starts: Starts::AlignedInBf16 }
    }

    /// Columns of the modulation, or of its gradient: those of a sample may start anywhere.
    pub(crate) fn columns(name: &'static str, buffer: Buffer, len: usize) -> Self {
        Operand { name, buffer, len, starts: Starts::Anywhere }
    }

    /// Whether it must start at a multiple of 16 bytes, where activations are `elem`.
    fn is_aligned(&self, elem: DType) -> bool {
        match (self.buffer.dtype, self.starts) {
            (DType::Bf16, _) | (DType::F32, Starts::Aligned) => true,
            (DType::F32, Starts::Anywhere) => false,
            // Weights of f32, and integers.
            _ => elem == DType::Bf16,
        }
    }
}

/// Refuses buffers that are too short, or start where 16 bytes cannot be read at a time.
pub(crate) fn check_buffers(operation: &'static str, elem: DType, operands: &[Operand]) -> Result<()> {
    for operand in operands {
        let Operand { name, buffer, len, .. } = operand;
        if buffer.len < *len {
            let what = format!("{name} has {} numbers, expected {len}", buffer.len);
            return Err(Error::Shape { operation, what });
        }
        if operand.is_aligned(elem) && !buffer.address.is_multiple_of(16) {
            let what = format!("{name} starts at {:#x}, but kernels read 16 bytes at a time", buffer.address);
            return Err(Error::Shape { operation, what });
        }
    }
    Ok(())
}

/// Refuses sizes that the bf16 products cannot read 16 bytes at a time, and those that do not fit 32 bits: `b` samples of `t` tokens, and
/// what a row has of channels or outputs. What it lets pass can be multiplied.
pub(crate) fn check_sizes(operation: &'static str, elem: DType, [b, t]: [usize; 2], sizes: &[usize]) -> Result<()> {
    if elem == DType::Bf16
        && let Some(size) = sizes.iter().find(|size| !size.is_multiple_of(8))
    {
        let what = format!("{size} channels or outputs in bf16, where they must be multiples of 8: use f32");
        return Err(Error::Shape { operation, what });
    }
    if b == 0 || t == 0 || sizes.contains(&0) {
        let what = format!("{b} samples of {t} tokens of {sizes:?}: there is nothing to compute");
        return Err(Error::Shape { operation, what });
    }
    let widest = sizes.iter().copied().max().unwrap_or(1);
    if b.checked_mul(t).is_none_or(|rows| rows > i32::MAX as usize / 2) || widest > 1 << 24 {
        let what = format!("{b} samples of {t} tokens of {widest} are too many for one launch");
        return Err(Error::Shape { operation, what });
    }
    Ok(())
}

/// Refuses counts that are more than kernels count to.
pub(crate) fn check_counts(operation: &'static str, counts: &[usize]) -> Result<()> {
    match counts.iter().find(|&&count| count > i32::MAX as usize) {
        None => Ok(()),
        Some(count) => Err(Error::Shape {
            operation,
            what: format!("{count} are too many for one launch, which takes {}", i32::MAX),
        }),
    }
}

/// Refuses vectors of samples that are further apart than kernels count.
pub(crate) fn check_stride(operation: &'static str, stride: usize) -> Result<()> {
    if stride <= i32::MAX as usize {
        return Ok(());
    }
    Err(Error::Shape {
        operation,
        what: format!("vectors of samples are {stride} numbers apart, at most {} are possible", i32::MAX),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_that_kernels_cannot_use_are_refused() {
        let at = |address, len, dtype| Buffer { address, len, dtype };
        let says = |buffer: Buffer, len| {
            check_buffers("product", buffer.dtype, &[Operand::new("x", buffer, len)])
                .map_err(|e| e.to_string())
                .err()
                .unwrap_or_default()
        };
        assert_eq!(says(at(32, 5, DType::Bf16), 5), "");
        assert!(says(at(36, 5, DType::F32), 5).contains("x starts at 0x24"));
        assert_eq!(says(Buffer::none(DType::Bf16), 0), "");
        assert!(says(at(32, 4, DType::Bf16), 5).contains("x has 4 numbers, expected 5"));
        assert!(says(Buffer::none(DType::F32), 1).contains("x has 0 numbers, expected 1"));
        assert!(says(at(40, 5, DType::Bf16), 5).contains("x starts at 0x28"));
    }

    #[test]
    fn where_a_buffer_may_start_depends_on_what_it_holds() {
        let at = |dtype| Buffer { address: 36, len: 5, dtype };
        let makes = [Operand::new, Operand::weight, Operand::columns];
        let accepted = |elem, dtype| {
            makes.map(|operand| check_buffers("product", elem, &[operand("any name", at(dtype), 5)]).is_ok())
        };
        assert_eq!(accepted(DType::F32, DType::F32), [false, true, true]);
        assert_eq!(accepted(DType::Bf16, DType::F32), [false, false, true]);
        assert_eq!(accepted(DType::Bf16, DType::Bf16), [false; 3]);
        assert_eq!(accepted(DType::Bf16, DType::I32), [false; 3]);
        assert_eq!(accepted(DType::F32, DType::I32), [true; 3]);
    }

    #[test]
    fn sizes_that_kernels_cannot_use_are_refused() {
        let says = |elem, rows, sizes: &[usize]| {
            check_sizes("product", elem, rows, sizes).map_err(|e| e.to_string()).err().unwrap_or_default()
        };
        assert_eq!(says(DType::F32, [1 << 15, 1 << 14], &[1 << 24, 1]), "");
        assert_eq!(says(DType::F32, [3, 5], &[7, 1]), "");
        assert!(says(DType::Bf16, [3, 5], &[8, 12]).contains("12 channels or outputs in bf16"));
        for (rows, sizes) in [([0, 5], [8, 8]), ([3, 0], [8, 8]), ([0, usize::MAX], [8, 8]), ([3, 5], [8, 0])] {
            assert!(says(DType::Bf16, rows, &sizes).contains("there is nothing to compute"), "{rows:?} of {sizes:?}");
        }
        assert!(check_stride("product", i32::MAX as usize).is_ok() && check_stride("product", 1 << 32).is_err());
        // The last three would wrap around to few rows.
        let half = usize::MAX / 2 + 1;
        for (rows, widest) in
            [([1, 1], (1 << 24) + 8), ([1 << 15, 1 << 15], 8), ([half, 2], 8), ([2, half], 8), ([half + 1, 2], 8)]
        {
            assert!(says(DType::F32, rows, &[8, widest]).contains("too many for one launch"), "{rows:?} of {widest}");
        }
    }

    #[test]
    fn few_tiles_are_small_ones() {
        let device = Device::on_paper("A100", 80, 108);
        let side = |rows, columns| tiling(&device, DType::Bf16, rows, columns).tile.m;
        assert_eq!([side(8192, 1152), side(512, 3456), side(512, 1152), side(1, 1)], [128, 128, 64, 64]);
    }

    #[test]
    fn wide_tiles_are_chosen_by_how_they_fill_the_device() {
        let device = Device::on_paper("H100", 90, 132);
        let tile = |elem, rows, columns| {
            let tile = tiling(&device, elem, rows, columns).tile;
            [tile.m, tile.n]
        };
        // 1152 columns are 6 tiles of 192 columns: 384 tiles are just under 3 for each multiprocessor.
        assert_eq!(tile(DType::Bf16, 8192, 1152), [128, 192]);
        assert_eq!(tile(DType::Bf16, 8192, 4608), [128, 256]);
        assert_eq!(tile(DType::Bf16, 1152, 1152), [128, 128]);
        assert_eq!(tile(DType::Bf16, 64, 3456), [128, 128]);
        assert_eq!(tile(DType::F32, 8192, 4608), [128, 128]);
        let overlapped = |arch, rows, columns| {
            let device = Device::on_paper("H100", arch, 132);
            let Tiling { tile, grid, .. } = overlapped_tiling(&device, DType::Bf16, rows, columns);
            (tile.m, tile.n, tile.threads, grid)
        };
        assert_eq!(overlapped(90, 8192, 4608), (128, 192, 512, [132, 1, 1]));
        assert_eq!(overlapped(90, 1024, 1152), (128, 128, 512, [72, 1, 1]));
        assert_eq!(overlapped(80, 8192, 4608), (128, 128, 128, [36, 64, 1]));
    }

    #[test]
    fn tiles_of_gradients_are_cut_where_they_would_leave_a_device_idle() {
        let device = Device::on_paper("H100", 90, 132);
        let tile = |rows, columns, inner, windows_of_rows| {
            let Tiling { tile, grid, .. } =
                gradient_tiling(&device, DType::Bf16, [rows, columns], inner, windows_of_rows);
            assert_eq!(grid[1..], [1, 1]);
            [tile.m, tile.n, grid[0] as usize]
        };
        // 90 tiles are cut, 120 and 216 are not.
        assert_eq!(tile(3456, 1152, 8192, false), [192, 256, 132]);
        assert_eq!(tile(4608, 1152, 8192, false), [192, 256, 120]);
        assert_eq!(tile(1152, 4608, 8192, true), [128, 192, 216]);
        // 9 tiles, of which each block has 16 chunks.
        assert_eq!(tile(32, 1152, 8192, false), [128, 128, 72]);
        assert_eq!(tile(32, 8, 64, false), [128, 128, 1]);
        let small = gradient_tiling(&Device::on_paper("A100", 80, 108), DType::Bf16, [72, 288], 48, true);
        assert_eq!((small.tile.m, small.grid), (64, [10, 1, 1]));
    }
}
