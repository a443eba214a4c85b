//! Matrix products of strided views, through the `gemm` crate.
//!
//! Every call here runs on one thread; callers split the output into tiles whose sizes do not depend on the number of
//! threads, so the same numbers are added in the same order however many threads there are.

use rayon::prelude::*;

/// A read-only matrix: element (i, j) is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major view of `rows` x `columns`, rows `row_stride` apart.
    #[inline]
    pub fn new(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, columns, row_stride), "view exceeds its data");
        Mat { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The transpose, without moving anything.
    #[inline]
    pub fn t(self) -> Self {
        Mat {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A writable row-major matrix, rows `row_stride` apart.
pub struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// A view of `rows` x `columns`, rows `row_stride` apart.
    #[inline]
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, columns, row_stride), "view exceeds its data");
        MatMut { data, rows, columns, row_stride }
    }
}

fn fits(len: usize, rows: usize, columns: usize, row_stride: usize) -> bool {
    let end = || (rows - 1).checked_mul(row_stride)?.checked_add(columns);
    rows == 0 || columns == 0 || (columns <= row_stride || rows == 1) && end().is_some_and(|end| end <= len)
}

/// What happens to the old contents of a product's destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Overwritten without being read.
    Set,
    /// Added to.
    Add,
}

/// `dst = a b` or `dst += a b` on the calling thread.
pub fn matmul(dst: MatMut, a: Mat, b: Mat, write: Write) {
    assert!(a.rows == dst.rows && b.columns == dst.columns && a.columns == b.rows, "product of unfit shapes");
    if dst.rows == 0 || dst.columns == 0 {
        return;
    }
    // SAFETY: `fits` held for the three views when they were made, so every element that rows, columns and strides
    // reach lies inside its slice; `dst` is borrowed mutably, so it overlaps neither `a` nor `b`.
    unsafe { product(dst.data.as_mut_ptr(), dst.row_stride, a, b, 0..dst.rows, 0..dst.columns, write) }
}

/// `dst = a b` or `dst += a b` with the tiles of `dst` spread over the threads of the current pool.
pub fn matmul_parallel(dst: MatMut, a: Mat, b: Mat, write: Write) {
    assert!(a.rows == dst.rows && b.columns == dst.columns && a.columns == b.rows, "product of unfit shapes");
    let (row_tile, column_tile) = tile(dst.rows, dst.columns);
    let across = dst.columns.div_ceil(column_tile);
    let tiles = dst.rows.div_ceil(row_tile) * across;
    let shared = Shared(dst.data.as_mut_ptr());
    let work = |index: usize| {
        let (i, j) = (index / across * row_tile, index % across * column_tile);
        let rows = i..(i + row_tile).min(dst.rows);
        let columns = j..(j + column_tile).min(dst.columns);
        // SAFETY: the views are in bounds (checked when they were made); tiles of different indices are disjoint, and
        // `dst` stays mutably borrowed until all of them are done.
        unsafe { product(shared.get(), dst.row_stride, a, b, rows, columns, write) }
    };
    if tiles == 1 {
        work(0);
    } else {
        (0..tiles).into_par_iter().for_each(work);
    }
}

/// Tile sizes for a destination: large enough that packing is cheap, small enough that there are several.
fn tile(rows: usize, columns: usize) -> (usize, usize) {
    let row_tile = if rows >= 512 { 256 } else { rows.div_ceil(2).max(64) };
    let column_tile = if rows >= 1024 { columns.max(1) } else { 256 };
    (row_tile, column_tile)
}

struct Shared(*mut f32);
// SAFETY: the pointer is only used for disjoint tiles, see `matmul_parallel`.
unsafe impl Sync for Shared {}
impl Shared {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// # Safety
/// `rows` x `columns` of the destination must be in bounds of the allocation behind `dst` and unshared; `a` must have
/// `rows.end` rows, `b` `columns.end` columns, and they must agree on the inner size.
unsafe fn product(
    dst: *mut f32,
    dst_stride: usize,
    a: Mat,
    b: Mat,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    write: Write,
) {
    let add = write == Write::Add;
    // SAFETY: in bounds by the contract above; with an inner size of 0 nothing is read.
    unsafe {
        gemm::gemm(
            rows.len(),
            columns.len(),
            a.columns,
            dst.add(rows.start * dst_stride + columns.start),
            1,
            dst_stride as isize,
            add,
            a.data.as_ptr().wrapping_add(rows.start * a.row_stride),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr().wrapping_add(columns.start * b.column_stride),
            b.column_stride as isize,
            b.row_stride as isize,
            if add { 1.0 } else { 0.0 },
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 2_654_435_761 % 1000) as f32 - 499.5) / 250.0).collect()
    }

    #[test]
    fn products_of_views_agree_with_loops() {
        for (m, k, n) in [(1, 1, 1), (5, 7, 3), (64, 33, 70), (600, 20, 9), (1100, 3, 300), (17, 0, 4)] {
            let (stride_a, stride_b, stride_c) = (k + 3, n + 1, n + 5);
            let a = numbers(m * stride_a);
            let bt = numbers(n * (k + 2));
            let b = numbers(k * stride_b);
            for transposed in [false, true] {
                let at = |i: usize, j: usize| a[i * stride_a + j];
                let bt_at = |i: usize, j: usize| if transposed { bt[j * (k + 2) + i] } else { b[i * stride_b + j] };
                let view_b = if transposed { Mat::new(&bt, n, k, k + 2).t() } else { Mat::new(&b, k, n, stride_b) };
                for write in [Write::Set, Write::Add] {
                    let start = numbers(m * stride_c);
                    let (mut one, mut many) = (start.clone(), start.clone());
                    matmul(MatMut::new(&mut one, m, n, stride_c), Mat::new(&a, m, k, stride_a), view_b, write);
                    matmul_parallel(
                        MatMut::new(&mut many, m, n, stride_c),
                        Mat::new(&a, m, k, stride_a),
                        view_b,
                        write,
                    );
                    for (i, j) in (0..m).flat_map(|i| (0..stride_c).map(move |j| (i, j))) {
                        let old = start[i * stride_c + j];
                        let expected = if j < n {
                            let sum: f32 = (0..k).map(|l| at(i, l) * bt_at(l, j)).sum();
                            sum + if write == Write::Add { old } else { 0.0 }
                        } else {
                            old
                        };
                        for got in [one[i * stride_c + j], many[i * stride_c + j]] {
                            assert!((got - expected).abs() <= 1e-4, "({i},{j}) of {m}x{k}x{n}: {got} for {expected}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "view exceeds its data")]
    fn a_view_beyond_its_data_is_refused() {
        Mat::new(&[0.0; 10], 3, 4, 4);
    }
}
