//! Tokens to the tree: modules and functions. Loops, no recursion beyond three levels of operands: hostile text cannot
//! exhaust the stack.

use super::ast::*;
use super::lexer::{Tok, Token, tokens};
use crate::error::LoadError;

/// Longest text that is read, bytes.
const MAX_TEXT: usize = 256 << 20;

pub(super) type Result<T> = std::result::Result<T, LoadError>;

/// Reads a whole module.
pub(crate) fn parse(text: &str) -> Result<Module> {
    if text.len() > MAX_TEXT {
        return Err(LoadError::new(0, "", format!("the text has {} bytes, more than {MAX_TEXT}", text.len())));
    }
    let tokens = tokens(text)?;
    let mut p = Parser { text, tokens, i: 0 };
    p.module()
}

pub(super) struct Parser<'a> {
    pub(super) text: &'a str,
    pub(super) tokens: Vec<Token<'a>>,
    pub(super) i: usize,
}

impl<'a> Parser<'a> {
    pub(super) fn peek(&self) -> Tok<'a> {
        self.tokens[self.i].tok
    }
    pub(super) fn line(&self) -> u32 {
        self.tokens[self.i].line
    }
    pub(super) fn next(&mut self) -> Tok<'a> {
        let t = self.peek();
        if t != Tok::End {
            self.i += 1;
        }
        t
    }
    pub(super) fn eat(&mut self, c: u8) -> bool {
        let hit = self.peek() == Tok::Punct(c);
        if hit {
            self.i += 1;
        }
        hit
    }
    pub(super) fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        let t = &self.tokens[self.i];
        let rest = &self.text[t.start..];
        let shown = rest.lines().next().unwrap_or("").trim_end();
        Err(LoadError::new(t.line, shown, message))
    }
    pub(super) fn expect(&mut self, c: u8) -> Result<()> {
        if self.eat(c) { Ok(()) } else { self.fail(format!("expected `{}` here", c as char)) }
    }
    pub(super) fn word(&mut self) -> Result<&'a str> {
        match self.peek() {
            Tok::Word(w) => {
                self.i += 1;
                Ok(w)
            }
            _ => self.fail("expected a name here"),
        }
    }
    pub(super) fn integer(&mut self) -> Result<u64> {
        match self.peek() {
            Tok::Int(v) => {
                self.i += 1;
                Ok(v)
            }
            _ => self.fail("expected an integer here"),
        }
    }

    pub(super) fn skip_line(&mut self) {
        let line = self.line();
        while self.line() == line && self.peek() != Tok::End {
            self.i += 1;
        }
    }

    pub(super) fn skip_to_semicolon(&mut self) {
        while !matches!(self.next(), Tok::Punct(b';') | Tok::End) {}
    }

    pub(super) fn skip_braces(&mut self) -> Result<()> {
        while self.peek() != Tok::Punct(b'{') {
            if self.next() == Tok::End {
                return self.fail("expected `{` before the end");
            }
        }
        let mut depth = 0u64;
        loop {
            match self.next() {
                Tok::Punct(b'{') => depth += 1,
                Tok::Punct(b'}') => depth -= 1,
                Tok::End => return self.fail("the section does not end"),
                _ => {}
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }

    fn module(&mut self) -> Result<Module> {
        let mut m = Module::default();
        loop {
            match self.peek() {
                Tok::End => break,
                Tok::Punct(b';') => self.i += 1,
                Tok::Dot("version") => {
                    self.i += 1;
                    m.version = match self.next() {
                        Tok::F64(bits) => {
                            let v = f64::from_bits(bits);
                            (v as u32, ((v - v.floor()) * 10.0).round() as u32)
                        }
                        Tok::Int(v) => (v.min(99) as u32, 0),
                        _ => return self.fail("`.version` needs a number"),
                    };
                }
                Tok::Dot("target") => {
                    self.i += 1;
                    m.target = self.word()?.to_owned();
                    while self.eat(b',') {
                        self.word()?;
                    }
                }
                Tok::Dot("address_size") => {
                    self.i += 1;
                    if self.integer()? != 64 {
                        return self.fail("only 64-bit addresses are supported");
                    }
                }
                Tok::Dot("file" | "loc") => self.skip_line(),
                Tok::Dot("section") => self.skip_braces()?,
                Tok::Dot("pragma") => self.skip_to_semicolon(),
                Tok::Dot("alias") => {
                    self.i += 1;
                    let a = self.word()?.to_owned();
                    self.expect(b',')?;
                    m.aliases.push((a, self.word()?.to_owned()));
                    self.expect(b';')?;
                }
                Tok::Dot(_) => self.global(&mut m)?,
                _ => return self.fail("expected a directive at module level"),
            }
        }
        if m.target.is_empty() {
            return Err(LoadError::new(0, "", "this is not PTX: there is no `.target`"));
        }
        Ok(m)
    }

    fn global(&mut self, m: &mut Module) -> Result<()> {
        let mut external = false;
        loop {
            match self.peek() {
                Tok::Dot("visible" | "weak" | "common") => self.i += 1,
                Tok::Dot("extern") => {
                    external = true;
                    self.i += 1;
                }
                Tok::Dot("entry") => {
                    let f = self.func(true)?;
                    m.funcs.push(f);
                    return Ok(());
                }
                Tok::Dot("func") => {
                    let f = self.func(false)?;
                    m.funcs.push(f);
                    return Ok(());
                }
                Tok::Dot("global" | "const" | "shared") => {
                    self.var(external, &mut m.vars)?;
                    return Ok(());
                }
                _ => return self.fail("this directive is not supported"),
            }
        }
    }

    fn func(&mut self, entry: bool) -> Result<Func> {
        let line = self.line();
        self.i += 1;
        let mut attributes = Attributes::default();
        self.attributes(&mut attributes)?;
        let returns = if self.peek() == Tok::Punct(b'(') { self.params()? } else { Vec::new() };
        let name = self.word()?.to_owned();
        let params = if self.peek() == Tok::Punct(b'(') { self.params()? } else { Vec::new() };
        self.attributes(&mut attributes)?;
        let body = if self.eat(b';') {
            None
        } else {
            self.expect(b'{')?;
            Some(self.body()?)
        };
        Ok(Func { line, name, entry, returns, params, attributes, body })
    }

    pub(super) fn attributes(&mut self, a: &mut Attributes) -> Result<()> {
        while let Tok::Dot(name) = self.peek() {
            let slot = match name {
                "maxntid" => Some(&mut a.maxntid),
                "reqntid" => Some(&mut a.reqntid),
                "reqnctapercluster" => Some(&mut a.cluster),
                _ => None,
            };
            self.i += 1;
            if let Some(slot) = slot {
                let mut dims = [1u32; 3];
                for (k, dim) in dims.iter_mut().enumerate() {
                    if k > 0 && !self.eat(b',') {
                        break;
                    }
                    *dim = u32::try_from(self.integer()?).or_else(|_| self.fail("this count is too large"))?;
                }
                *slot = Some(dims);
                continue;
            }
            match name {
                "maxnreg" => a.maxnreg = Some(self.integer()?.min(u64::from(u32::MAX)) as u32),
                "minnctapersm" => a.minnctapersm = Some(self.integer()?.min(u64::from(u32::MAX)) as u32),
                "maxnctapersm" | "maxclusterrank" | "abi_preserve" | "abi_preserve_control" => {
                    self.integer()?;
                }
                "noreturn" | "explicitcluster" | "blocksareclusters" => {}
                "pragma" => self.skip_to_semicolon(),
                "attribute" => while !matches!(self.next(), Tok::Punct(b')') | Tok::End) {},
                _ => {
                    self.i -= 1;
                    return self.fail("this directive is not supported");
                }
            }
        }
        Ok(())
    }
}
