use std::collections::HashMap;
use std::convert::Infallible;

use dwcp_proto::PageIndex;
use dwcp_proto::limits::PAGE_SIZE;

use crate::{Page, Sink, Span};

/// A guest's RAM: it holds every page, and writes the VMM's stream besides.
#[derive(Debug, Default)]
pub struct Ram {
    /// The stream.
    pub out: Vec<u8>,
    /// The pages, by block and index.
    pub pages: HashMap<(Vec<u8>, u64), Box<Page>>,
}

impl Ram {
    fn write(&mut self, span: Span<'_>, page: &Page) {
        self.pages.insert((span.block.to_vec(), span.first.0), Box::new(*page));
    }
}

impl Sink for Ram {
    type Error = Infallible;

    fn opaque(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.out.opaque(bytes)
    }

    fn pages(&mut self, span: Span<'_>, pages: &[Page]) -> Result<(), Infallible> {
        span.each().zip(pages).for_each(|(span, page)| self.write(span, page));
        self.out.pages(span, pages)
    }

    fn zeros(&mut self, span: Span<'_>, full: bool) -> Result<(), Infallible> {
        span.each().for_each(|span| self.write(span, &[0; PAGE_SIZE]));
        self.out.zeros(span, full)
    }

    fn held(&mut self, block: &[u8], index: PageIndex, into: &mut Page) -> Result<bool, Infallible> {
        let page = self.pages.get(&(block.to_vec(), index.0));
        if let Some(page) = page {
            *into = **page;
        }
        Ok(page.is_some())
    }
}
