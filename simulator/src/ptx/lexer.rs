//! Text to tokens.

use crate::error::LoadError;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Tok<'a> {
    Word(&'a str),
    /// `.word`, without the dot.
    Dot(&'a str),
    Int(u64),
    F32(u32),
    F64(u64),
    Str,
    Punct(u8),
    End,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Token<'a> {
    pub tok: Tok<'a>,
    pub line: u32,
    pub start: usize,
}

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%')
}

/// All tokens of `text`, the last of them [`Tok::End`].
pub(crate) fn tokens(text: &str) -> Result<Vec<Token<'_>>, LoadError> {
    let b = text.as_bytes();
    let at = |i: usize| b.get(i).copied().unwrap_or(0);
    let (mut i, mut line, mut out) = (0, 1u32, Vec::new());
    while i < b.len() {
        let c = b[i];
        let start = i;
        let tok = match c {
            b'\n' => {
                line += 1;
                i += 1;
                continue;
            }
            _ if c.is_ascii_whitespace() || c == 0 => {
                i += 1;
                continue;
            }
            b'/' if at(i + 1) == b'/' => {
                while i < b.len() && b[i] != b'\n' {
                    i += 1;
                }
                continue;
            }
            b'/' if at(i + 1) == b'*' => {
                let Some(length) = text[i + 2..].find("*/") else {
                    return Err(LoadError::new(line, "/*", "the comment does not end"));
                };
                line += text[i..i + 2 + length].bytes().filter(|&c| c == b'\n').count() as u32;
                i += length + 4;
                continue;
            }
            b'"' => {
                i += 1;
                while i < b.len() && b[i] != b'"' && b[i] != b'\n' {
                    i += if b[i] == b'\\' { 2 } else { 1 };
                }
                if at(i) != b'"' {
                    return Err(LoadError::new(line, "\"", "the string does not end on its line"));
                }
                i += 1;
                Tok::Str
            }
            b'.' if is_word(at(i + 1)) => {
                i += 1;
                while is_word(at(i)) || (at(i) == b':' && at(i + 1) == b':' && is_word(at(i + 2))) {
                    i += if at(i) == b':' { 2 } else { 1 };
                }
                Tok::Dot(&text[start + 1..i])
            }
            b'0'..=b'9' => {
                let (tok, end) = number(text, i).ok_or_else(|| {
                    let end = (i..b.len()).find(|&j| !is_word(b[j]) && b[j] != b'.').unwrap_or(b.len());
                    LoadError::new(line, &text[i..end], "this is not a number")
                })?;
                i = end;
                tok
            }
            _ if is_word(c) => {
                while is_word(at(i)) {
                    i += 1;
                }
                // Special registers have parts: `%tid.x`.
                if c == b'%' && at(i) == b'.' && matches!(at(i + 1), b'x' | b'y' | b'z' | b'w') && !is_word(at(i + 2)) {
                    i += 2;
                }
                Tok::Word(&text[start..i])
            }
            _ if c.is_ascii_punctuation() => {
                i += 1;
                Tok::Punct(c)
            }
            _ => {
                return Err(LoadError::new(line, "", format!("byte {c:#04x} has no meaning here")));
            }
        };
        out.push(Token { tok, line, start });
    }
    out.push(Token { tok: Tok::End, line, start: b.len() });
    Ok(out)
}

/// The number at `start`, and where it ends.
fn number(text: &str, start: usize) -> Option<(Tok<'_>, usize)> {
    let b = text.as_bytes();
    let run = |from: usize, ok: fn(&u8) -> bool| from + b[from..].iter().take_while(|c| ok(c)).count();
    let hex = |c: &u8| c.is_ascii_hexdigit();
    if b[start] == b'0' {
        match b.get(start + 1).copied().unwrap_or(0) {
            b'f' | b'F' if run(start + 2, hex) == start + 10 => {
                return Some((Tok::F32(u32::from_str_radix(&text[start + 2..start + 10], 16).ok()?), start + 10));
            }
            b'd' | b'D' if run(start + 2, hex) == start + 18 => {
                return Some((Tok::F64(u64::from_str_radix(&text[start + 2..start + 18], 16).ok()?), start + 18));
            }
            _ => {}
        }
    }
    let (radix, digits) = match (b[start], b.get(start + 1).copied().unwrap_or(0)) {
        (b'0', b'x' | b'X') => (16, start + 2),
        (b'0', b'b' | b'B') => (2, start + 2),
        (b'0', b'0'..=b'7') => (8, start + 1),
        _ => (10, start),
    };
    let mut end = match radix {
        16 => run(digits, hex),
        2 => run(digits, |c| matches!(c, b'0' | b'1')),
        8 => run(digits, |c| matches!(c, b'0'..=b'7')),
        _ => run(digits, u8::is_ascii_digit),
    };
    let digit_at = |i: usize| b.get(i).is_some_and(u8::is_ascii_digit);
    let exponent = |i: usize| {
        matches!(b.get(i), Some(b'e' | b'E'))
            && (digit_at(i + 1) || (matches!(b.get(i + 1), Some(b'+' | b'-')) && digit_at(i + 2)))
    };
    if radix == 10 && ((b.get(end) == Some(&b'.') && digit_at(end + 1)) || exponent(end)) {
        if b.get(end) == Some(&b'.') {
            end = run(end + 1, u8::is_ascii_digit);
        }
        if exponent(end) {
            end = run(end + 2, u8::is_ascii_digit);
        }
        return Some((Tok::F64(text[start..end].parse::<f64>().ok()?.to_bits()), end));
    }
    let value = u64::from_str_radix(&text[digits..end], radix).ok()?;
    if matches!(b.get(end), Some(b'U' | b'u')) {
        end += 1;
    }
    if b.get(end).is_some_and(|&c| is_word(c)) {
        return None;
    }
    Some((Tok::Int(value), end))
}
