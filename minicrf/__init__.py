"""A network trained through a fully connected CRF, with every backward method written by hand.

Public names: DenseCRF, FeatureCRF, LocalCRF, learn, search, cross_fitted, PermutohedralLattice,
scores_from_labels, scores_from_probabilities, VOID.
Read the files of this folder in this order, each resting on those before it:

    plain           the whole paper on a few screens, nothing fast in it
    arrays          NumPy or CuPy: the one file that imports CuPy
    gradcheck       finite differences: what every backward below is held against
    losses          softmax, and the log-likelihood of the truth            Eqs. 6, 8
    im2col          a convolution as one matrix product
    layers          convolution with holes, ReLU, pooling, upsampling; forward above backward
    vgg             the 16-layer net: 306 x 306 pixels to 40 x 40 cells     Sec. 4.1
    permutohedral   Gaussian filtering in linear time                       [Adams 2010]
    kernels         k_m(i,j), normalised, and the gradient of its widths    below Eq. 9
    marginals       softmax, or the damped update that converges            Sec. 3.1
    meanfield       mean field forward, back-tracking backward              Eq. 5, Fig. 3
    densecrf        the same, with the features of an image                 Eq. 9, Sec. 4.1
    localcrf        the earlier system: local factors, belief propagation   Eq. 3, Fig. 2
    optim           momentum SGD
    learning        a CRF alone, by likelihood
    metrics         intersection over union, VOC's measure                  Sec. 4.2
    search          a CRF alone, by intersection over union, as [3] did
    training        network and CRF, one step, and the rates of each stage  Fig. 3

inputs checks what callers hand in, scores makes class scores of labels or probabilities, saving
writes and reads files.  Three rooms hold what you need not read to learn: data/, what goes in (data
sets, photographs, weights), results/, what comes out (checkpoints, logs, tables, pictures), and
programs/, what the command lines share; `python -m minicrf` is the CRF on the command line.
"""
__version__ = "0.1.0"

from .densecrf import DenseCRF
from .inputs import VOID
from .learning import learn
from .localcrf import LocalCRF
from .meanfield import FeatureCRF
from .permutohedral import PermutohedralLattice
from .scores import scores_from_labels, scores_from_probabilities
from .search import cross_fitted, search
