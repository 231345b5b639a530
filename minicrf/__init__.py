"""A network trained through a fully connected CRF, with every backward method written by hand.

Public names: DenseCRF, LocalCRF, scores_from_probabilities, scores_from_labels, PermutohedralLattice.
Read the files in this order, each resting on those before it:

    arrays          NumPy or CuPy: the one file that imports CuPy
    gradcheck       finite differences: what every backward below is held against
    losses          softmax, and the log-likelihood of the truth            Eqs. 6, 8
    im2col          a convolution as one matrix product
    layers          convolution with holes, ReLU, pooling, upsampling; forward above backward
    vgg             the 16-layer net: 306 x 306 pixels to 40 x 40 cells     Sec. 4.1
    permutohedral   Gaussian filtering in linear time                       [Adams 2010]
    kernels         k_m(i,j), normalised, and its derivative by sigma       Eq. 9
    densecrf        mean field forward, back-tracking backward              Eq. 5, Fig. 3
    localcrf        the system before: local factors, belief propagation    Eq. 3, Fig. 2
    optim           momentum SGD
    training        one step, two stages, evaluation                        Figs. 1 and 3

The rest is plumbing: files, voc, loading, toy, weights, checkpoints and pictures read and write;
scores makes class scores of labels or probabilities; metrics counts; logs keeps the course of a
run, figures draws it, reports sums it up; __main__ is the CRF on the command line.  README.md, "The
lesson", derives the mathematics, starting with the CRF.
"""
__version__ = "0.1.0"

from .densecrf import DenseCRF
from .localcrf import LocalCRF
from .permutohedral import PermutohedralLattice
from .scores import scores_from_labels, scores_from_probabilities
