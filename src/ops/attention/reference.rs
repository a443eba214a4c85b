//! The specification of [`attention`](super::attention): plain loops.

use crate::ops::real::Real;

/// Sizes: B, T, C and the number of heads.
#[derive(Clone, Copy)]
pub struct Dims {
    /// B
    pub batch: usize,
    /// T
    pub tokens: usize,
    /// C
    pub channels: usize,
    /// NH
    pub heads: usize,
}

/// Element `i` of part 0 (query), 1 (key) or 2 (value).
fn at<R: Copy>(qkv: &[R], d: Dims, b: usize, t: usize, part: usize, head: usize, i: usize) -> R {
    qkv[(b * d.tokens + t) * 3 * d.channels + part * d.channels + head * (d.channels / d.heads) + i]
}

/// The softmax row of one query.
fn probabilities<R: Real>(qkv: &[R], d: Dims, b: usize, t: usize, head: usize) -> Vec<R> {
    let size = d.channels / d.heads;
    let mut row = Vec::with_capacity(d.tokens);
    for s in 0..d.tokens {
        let mut dot = R::zero();
        for i in 0..size {
            dot += at(qkv, d, b, t, 0, head, i) * at(qkv, d, b, s, 1, head, i);
        }
        row.push(dot / R::from_f64(size as f64).sqrt());
    }
    let max = row.iter().copied().fold(row[0], |a, x| if x > a { x } else { a });
    let mut sum = R::zero();
    for x in &mut row {
        *x = (*x - max).exp();
        sum += *x;
    }
    for x in &mut row {
        *x = (*x / sum).stored();
    }
    row
}

/// `out`, `[B, T, C]`, of `qkv` `[B, T, 3C]`.
pub fn forward<R: Real>(qkv: &[R], d: Dims) -> Vec<R> {
    let size = d.channels / d.heads;
    let mut out = vec![R::zero(); d.batch * d.tokens * d.channels];
    for b in 0..d.batch {
        for t in 0..d.tokens {
            for head in 0..d.heads {
                let p = probabilities(qkv, d, b, t, head);
                for (s, &p) in p.iter().enumerate() {
                    for i in 0..size {
                        out[(b * d.tokens + t) * d.channels + head * size + i] += p * at(qkv, d, b, s, 2, head, i);
                    }
                }
            }
        }
    }
    out.into_iter().map(R::stored).collect()
}

/// Gradient of `sum(out * dout)` with respect to `qkv`, `[B, T, 3C]`.
pub fn backward<R: Real>(qkv: &[R], dout: &[R], d: Dims) -> Vec<R> {
    let size = d.channels / d.heads;
    let scale = R::one() / R::from_f64(size as f64).sqrt();
    let mut dqkv = vec![R::zero(); qkv.len()];
    let place = |b: usize, t: usize, part: usize, head: usize| {
        (b * d.tokens + t) * 3 * d.channels + part * d.channels + head * size
    };
    for b in 0..d.batch {
        for t in 0..d.tokens {
            for head in 0..d.heads {
                let p = probabilities(qkv, d, b, t, head);
                let dout = &dout[(b * d.tokens + t) * d.channels + head * size..][..size];
                let mut dp = vec![R::zero(); d.tokens];
                let mut delta = R::zero();
                for s in 0..d.tokens {
                    for i in 0..size {
                        dp[s] += dout[i] * at(qkv, d, b, s, 2, head, i);
                        dqkv[place(b, s, 2, head) + i] += p[s] * dout[i];
                    }
                    delta += p[s] * dp[s];
                }
                for s in 0..d.tokens {
                    let ds = (p[s] * (dp[s] - delta)).stored() * scale;
                    for i in 0..size {
                        dqkv[place(b, t, 0, head) + i] += ds * at(qkv, d, b, s, 1, head, i);
                        dqkv[place(b, s, 1, head) + i] += ds * at(qkv, d, b, t, 0, head, i);
                    }
                }
            }
        }
    }
    dqkv.into_iter().map(R::stored).collect()
}
